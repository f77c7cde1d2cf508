"""How gradients travel between ranks: buckets in, rows to judge out, the weighted average back.

An exchange moves bytes and adds numbers. Which rank counts how much is decided elsewhere, between `sum` and
`gather`. All ranks of the group must call the same methods in the same order.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.gramian import combine


class Exchange(Protocol):
    """Three collectives, called in this order; the bucket is `(N,)`, any floating dtype, contiguous."""

    def scatter(self, bucket: Tensor) -> Tensor:
        """Return rows `(W, n)`: the elements this rank judges, of every rank's bucket, in rank order."""
        ...

    def sum(self, gramian: Tensor) -> Tensor:
        """Return the Gramian `(W, W)` of the whole buckets, the same bits on every rank."""
        ...

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """Write the average of the rows by their weights `(W,)` into bucket, the same bits on every rank."""
        ...


class GatherExchange:
    """The plain reading of the method: all-gather every bucket, judge, all-reduce the agreeing subset.

    Sends `(W − 1) N + 2 (W − 1)/W N` elements per rank and holds `W N`: for reference, and for buckets so small
    that latency rules.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._wire_dtype = wire_dtype

    def scatter(self, bucket: Tensor) -> Tensor:
        """Return every rank's whole bucket, rows `(W, N)`."""
        sent = bucket if self._wire_dtype is None else bucket.to(self._wire_dtype)
        rows = sent.new_empty(self._group.size(), sent.numel())
        dist.all_gather_into_tensor(rows.view(-1), sent, group=self._group)
        return rows

    def sum(self, gramian: Tensor) -> Tensor:
        """Return rank 0's Gramian: each rank has the whole one, but unlike machines round unlike."""
        dist.broadcast(gramian, group=self._group, group_src=0)
        return gramian

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """All-reduce this rank's weighted bucket into bucket `(N,)`; a left-out rank adds zeros."""
        own = slice(self._group.rank(), self._group.rank() + 1)
        wide = torch.promote_types(bucket.dtype, torch.float32)  # sums stay in float32 for half precision too
        share = combine(rows[own], weights[own], out=bucket if bucket.dtype == wide else bucket.to(wide))
        dist.all_reduce(share, group=self._group)
        if share is not bucket:
            bucket.copy_(share)


class ShardedExchange:
    """The bytes of an all-reduce: all-to-all of 1/W slices, a Gramian all-reduce, all-gather of the result.

    Rank r judges elements `[r n, (r + 1) n)` of every bucket, `n = ceil(N / W)`, computes their final bits and
    everyone copies them. Sends `2 (W − 1)/W N` elements and W² floats per rank, holds about N. A bucket that W
    does not divide travels in a padded copy.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._wire_dtype = wire_dtype

    def scatter(self, bucket: Tensor) -> Tensor:
        """Return this rank's slice of every bucket, rows `(W, n)`."""
        sent = self._padded(bucket)
        if sent is not bucket:
            sent[: bucket.numel()].copy_(bucket)
        rows = torch.empty_like(sent).view(self._group.size(), -1)
        dist.all_to_all_single(rows.view(-1), sent, group=self._group)
        return rows

    def sum(self, gramian: Tensor) -> Tensor:
        """All-reduce the slices' Gramians `(W, W)`."""
        dist.all_reduce(gramian, group=self._group)
        return gramian

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """Average this rank's slice and all-gather everyone's into bucket `(N,)`."""
        received = self._padded(bucket)
        shard = combine(rows, weights)
        dist.all_gather_into_tensor(received, shard, group=self._group)
        if received is not bucket:
            bucket.copy_(received[: bucket.numel()])

    def _padded(self, bucket: Tensor) -> Tensor:
        """Return the bucket itself if it can travel as it is, or room for a copy that can."""
        size = self._group.size()
        dtype = self._wire_dtype or bucket.dtype
        if dtype == bucket.dtype and bucket.numel() % size == 0:
            return bucket
        return bucket.new_zeros(-(-bucket.numel() // size) * size, dtype=dtype)


class PeerExchange:
    """`ShardedExchange` over plain sends and receives, for gloo on the CPU.

    Gloo's all-gather runs through a second full buffer and its all-to-all takes equal time again; sends straight
    out of the bucket and receives straight into it need neither, nor padding. Same bytes, same result.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._wire_dtype = wire_dtype

    def scatter(self, bucket: Tensor) -> Tensor:
        """Return this rank's slice of every bucket, rows `(W, n)`; n differs by at most 1 between ranks."""
        sent = bucket if self._wire_dtype is None else bucket.to(self._wire_dtype)
        slices = sent.tensor_split(self._group.size())
        own = slices[self._group.rank()]
        rows = own.new_empty(len(slices), own.numel())
        rows[self._group.rank()].copy_(own)
        self._swap(slices, list(rows))
        return rows

    def sum(self, gramian: Tensor) -> Tensor:
        """All-reduce the slices' Gramians `(W, W)`."""
        dist.all_reduce(gramian, group=self._group)
        return gramian

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """Average this rank's slice in place and send it to everyone's bucket `(N,)`."""
        received = bucket if self._wire_dtype is None else torch.empty_like(bucket, dtype=self._wire_dtype)
        slices = received.tensor_split(self._group.size())
        own = combine(rows, weights, out=slices[self._group.rank()])
        self._swap([own] * len(slices), slices)
        if received is not bucket:
            bucket.copy_(received)

    def _swap(
        self, sent: "list[Tensor] | tuple[Tensor, ...]", received: "list[Tensor] | tuple[Tensor, ...]"
    ) -> None:
        """Send `sent[r]` to each other rank r and receive its tensor into `received[r]`."""
        rank, size = self._group.rank(), self._group.size()
        works = []
        for step in range(1, size):
            source = (rank - step) % size
            works.append(dist.irecv(received[source], group=self._group, group_src=source))
        for step in range(1, size):
            target = (rank + step) % size
            works.append(dist.isend(sent[target], group=self._group, group_dst=target))
        for work in works:
            if work is not None:
                work.wait()


# Below this many bytes in all, a bucket's time is latency and the gather exchange's two hops win.
_LATENCY_BYTES = 65_536


def choose_exchange(
    name: str, group: dist.ProcessGroup, bucket: Tensor, wire_dtype: torch.dtype | None
) -> Exchange:
    """Return the exchange called name; `"auto"` decides by W and the bucket's bytes, alike on every rank."""
    wire_dtype = wire_dtype if group.size() > 1 else None  # nothing travels
    small = group.size() * bucket.numel() * bucket.element_size() <= _LATENCY_BYTES
    if name == "gather" or (name == "auto" and small):
        return GatherExchange(group, wire_dtype)
    return (PeerExchange if bucket.device.type == "cpu" else ShardedExchange)(group, wire_dtype)
