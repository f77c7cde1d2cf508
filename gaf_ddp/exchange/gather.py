"""The plain reading of the method: all-gather every bucket."""

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.kernels.gram import combine
from gaf_ddp.runtime.collectives import all_gather_single, all_reduce_gramian


class GatherExchange:
    """The plain reading of the method: all-gather every bucket, judge, all-reduce the agreeing subset.

    Sends `(W − 1) N + 2 (W − 1)/W N` elements per rank and holds `W N`: for reference, and for buckets so small
    that latency rules.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._wire_dtype = wire_dtype

    def scatter(self, bucket: Tensor) -> Tensor:
        """All-gather every rank's whole bucket, rows `(W, N)`."""
        sent = bucket if self._wire_dtype is None else bucket.to(self._wire_dtype)
        rows = sent.new_empty(self._group.size(), sent.numel())
        all_gather_single(rows.view(-1), sent, group=self._group)
        return rows

    def sum(self, measured: Tensor) -> Tensor:
        """Return rank 0's, and every rank's message: each has it all, but unlike machines round unlike."""
        if self._group.rank() != 0:
            measured[: self._group.size()] = 0
        return all_reduce_gramian(measured, self._group)

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """All-reduce this rank's weighted bucket into bucket `(N,)`; a left-out rank adds zeros."""
        own = slice(self._group.rank(), self._group.rank() + 1)
        wide = torch.promote_types(bucket.dtype, torch.float32)  # sums stay in float32 for half precision too
        share = combine(rows[own], weights[own], bucket if bucket.dtype == wide else bucket.to(wide))
        dist.all_reduce(share, group=self._group)
        if share is not bucket:
            bucket.copy_(share)
