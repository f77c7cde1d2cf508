"""Each rank judges its own slice of every bucket: a ring all-reduce's bytes."""

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.kernels.gram import combine
from gaf_ddp.runtime.collectives import all_gather_single, all_reduce_gramian


class ShardedExchange:
    """All-to-all of 1/W slices, a Gramian all-reduce, all-gather of the result: a ring's bytes per rank.

    Rank r judges elements `[r n, (r + 1) n)` of every bucket, `n = ceil(N / W)`, computes their final bits and
    everyone copies them. Sends `2 (W − 1)/W N` elements per rank; of the all-to-all's half `G (W − G)/(W − 1)` times
    as many as a ring's leave a host of G ranks. All-reduces at most `W (W + 1)` float64 numbers, holds about N. A
    bucket that W does not divide travels in a padded copy.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._wire_dtype = wire_dtype

    def scatter(self, bucket: Tensor) -> Tensor:
        """Exchange slices, rows `(W, n)`."""
        sent = self._padded(bucket)
        if sent is not bucket:
            sent[: bucket.numel()].copy_(bucket)
            sent[bucket.numel() :].zero_()
        rows = torch.empty_like(sent).view(self._group.size(), -1)
        dist.all_to_all_single(rows.view(-1), sent, group=self._group)
        return rows

    def sum(self, measured: Tensor) -> Tensor:
        """All-reduce what was measured on the slices."""
        return all_reduce_gramian(measured, self._group)

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """Average this rank's slice and all-gather everyone's into bucket `(N,)`."""
        received = self._padded(bucket)
        all_gather_single(received, combine(rows, weights), group=self._group)
        if received is not bucket:
            bucket.copy_(received[: bucket.numel()])

    def _padded(self, bucket: Tensor) -> Tensor:
        """Return the bucket itself if it can travel as it is, or room for a copy that can."""
        size = self._group.size()
        dtype = self._wire_dtype or bucket.dtype
        if dtype == bucket.dtype and bucket.numel() % size == 0:
            return bucket
        return bucket.new_empty(-(-bucket.numel() // size) * size, dtype=dtype)
