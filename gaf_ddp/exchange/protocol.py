"""How gradients travel between ranks: buckets in, rows to judge out, the weighted average back.

An exchange moves bytes and adds numbers. Which rank counts how much is decided elsewhere, between `sum` and
`gather`. All ranks of the group must call the same methods in the same order.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.kernels.gram import Rows, combine
from gaf_ddp.runtime.collectives import all_gather_single, all_reduce_gramian


class Exchange(Protocol):
    """Three collectives, called in this order; the bucket is `(N,)`, any floating dtype, contiguous."""

    def scatter(self, bucket: Tensor) -> Callable[[], Rows]:
        """Return a function that waits for the rows and returns them.

        Rows `(W, n)`: the elements this rank judges, of every rank's bucket, in rank order. Only `PeerExchange`
        starts sending at once; the others, whose collectives must keep their order, when the function is called.
        """
        ...

    def sum(self, measured: Tensor) -> Tensor:
        """Return what was measured on the whole buckets, the same bits on every rank.

        Measured `(W + r, W)`: the Gramian of the rows, and below it r rows, this rank's own message, of which every
        rank has another, and which add up over the ranks.
        """
        ...

    def gather(self, rows: Rows, weights: Tensor, bucket: Tensor) -> Callable[[], None] | None:
        """Write the average of the rows by the weights `(W,)` into bucket, the same bits on every rank.

        Return a function that waits until it is all there, or None where the device's stream, or the call, already
        did. The rows are the exchange's again after this.
        """
        ...


class GatherExchange:
    """The plain reading of the method: all-gather every bucket, judge, all-reduce the agreeing subset.

    Sends `(W − 1) N + 2 (W − 1)/W N` elements per rank and holds `W N`: for reference, and for buckets so small
    that latency rules.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._wire_dtype = wire_dtype

    def scatter(self, bucket: Tensor) -> Callable[[], Tensor]:
        """Return a function that all-gathers every rank's whole bucket, rows `(W, N)`."""
        return partial(self._all_gather, bucket)

    def _all_gather(self, bucket: Tensor) -> Tensor:
        sent = bucket if self._wire_dtype is None else bucket.to(self._wire_dtype)
        rows = sent.new_empty(self._group.size(), sent.numel())
        all_gather_single(rows.view(-1), sent, group=self._group)
        return rows

    def sum(self, measured: Tensor) -> Tensor:
        """Return rank 0's, and every rank's message: each has it all, but unlike machines round unlike."""
        if self._group.rank() != 0:
            measured[: self._group.size()] = 0
        return all_reduce_gramian(measured, self._group)

    def gather(self, rows: Rows, weights: Tensor, bucket: Tensor) -> None:
        """All-reduce this rank's weighted bucket into bucket `(N,)`; a left-out rank adds zeros."""
        own = slice(self._group.rank(), self._group.rank() + 1)
        wide = torch.promote_types(bucket.dtype, torch.float32)  # sums stay in float32 for half precision too
        share = combine(rows[own], weights[own], bucket if bucket.dtype == wide else bucket.to(wide))
        dist.all_reduce(share, group=self._group)
        if share is not bucket:
            bucket.copy_(share)


class ShardedExchange:
    """All-to-all of 1/W slices, a Gramian all-reduce, all-gather of the result: a ring's bytes per rank.

    Rank r judges elements `[r n, (r + 1) n)` of every bucket, `n = ceil(N / W)`, computes their final bits and
    everyone copies them. Sends `2 (W − 1)/W N` elements per rank; of these `G (W − G)/(W − 1)` times as many as a
    ring's leave a host of G ranks. All-reduces at most `W (W + 1)` float64 numbers, holds about N. A bucket that W
    does not divide travels in a padded copy.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._wire_dtype = wire_dtype

    def scatter(self, bucket: Tensor) -> Callable[[], Tensor]:
        """Return a function that exchanges slices, rows `(W, n)`."""
        return partial(self._all_to_all, bucket)

    def _all_to_all(self, bucket: Tensor) -> Tensor:
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

    def gather(self, rows: Rows, weights: Tensor, bucket: Tensor) -> None:
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
