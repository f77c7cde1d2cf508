"""How gradients travel between ranks: buckets in, rows to judge out, the weighted average back.

An exchange moves bytes and adds numbers. Which rank counts how much is decided elsewhere, between `sum` and
`gather`. All ranks of the group must call the same methods in the same order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import triangle
from gaf_ddp.gramian import Rows, combine
from gaf_ddp.workspace import CACHE_LINE, Workspace


class Average(Protocol):
    """What was decided over W ranks, as far as an exchange has to know: `verdict.Verdict` is one."""

    @property
    def weights(self) -> Tensor:
        """Each rank's share, `(W,)`."""
        ...

    def combine(self, rows: Rows, out: Tensor | None = None) -> Tensor:
        """Return the sum `(n,)` of W rows by their weights, in out where there is one."""
        ...


class Exchange(Protocol):
    """Three collectives, called in this order; the bucket is `(N,)`, any floating dtype, contiguous."""

    def scatter(self, bucket: Tensor) -> Callable[[], Rows]:
        """Return a function that waits for the rows and returns them.

        Rows `(W, n)`: the elements this rank judges, of every rank's bucket, in rank order. Only `PeerExchange`
        starts sending at once; the others, whose collectives must keep their order, when the function is called.
        """
        ...

    def sum(self, gramian: Tensor) -> Tensor:
        """Return the Gramian `(W, W)` of the whole buckets, the same bits on every rank."""
        ...

    def gather(self, rows: Rows, average: Average, bucket: Tensor) -> Callable[[], None]:
        """Write the average of the rows into bucket, the same bits on every rank.

        Return a function that waits until it is all there. The rows are the exchange's again after this.
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
        dist.all_gather_into_tensor(rows.view(-1), sent, group=self._group)
        return rows

    def sum(self, gramian: Tensor) -> Tensor:
        """Return rank 0's Gramian: each rank has the whole one, but unlike machines round unlike."""
        dist.broadcast(gramian, group=self._group, group_src=0)
        return gramian

    def gather(self, rows: Rows, average: Average, bucket: Tensor) -> Callable[[], None]:
        """All-reduce this rank's weighted bucket into bucket `(N,)`; a left-out rank adds zeros."""
        own = slice(self._group.rank(), self._group.rank() + 1)
        wide = torch.promote_types(bucket.dtype, torch.float32)  # sums stay in float32 for half precision too
        share = combine(rows[own], average.weights[own], bucket if bucket.dtype == wide else bucket.to(wide))
        dist.all_reduce(share, group=self._group)
        if share is not bucket:
            bucket.copy_(share)
        return _nothing


class ShardedExchange:
    """The bytes of an all-reduce: all-to-all of 1/W slices, a Gramian all-reduce, all-gather of the result.

    Rank r judges elements `[r n, (r + 1) n)` of every bucket, `n = ceil(N / W)`, computes their final bits and
    everyone copies them. Sends `2 (W − 1)/W N` elements per rank, all-reduces at most W² floats, holds about N.
    A bucket that W does not divide travels in a padded copy.
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
        rows = torch.empty_like(sent).view(self._group.size(), -1)
        dist.all_to_all_single(rows.view(-1), sent, group=self._group)
        return rows

    def sum(self, gramian: Tensor) -> Tensor:
        """All-reduce the slices' Gramians `(W, W)`."""
        return triangle.all_reduce(gramian, self._group)

    def gather(self, rows: Rows, average: Average, bucket: Tensor) -> Callable[[], None]:
        """Average this rank's slice and all-gather everyone's into bucket `(N,)`."""
        received = self._padded(bucket)
        shard = average.combine(rows)
        dist.all_gather_into_tensor(received, shard, group=self._group)
        if received is not bucket:
            bucket.copy_(received[: bucket.numel()])
        return _nothing

    def _padded(self, bucket: Tensor) -> Tensor:
        """Return the bucket itself if it can travel as it is, or room for a copy that can."""
        size = self._group.size()
        dtype = self._wire_dtype or bucket.dtype
        if dtype == bucket.dtype and bucket.numel() % size == 0:
            return bucket
        return bucket.new_zeros(-(-bucket.numel() // size) * size, dtype=dtype)


class PeerExchange:
    """`ShardedExchange` over plain sends and receives, for gloo on the CPU.

    Gloo's all-gather runs through a second full buffer; sends straight out of the bucket and receives straight
    into it need none, nor padding. Same bytes, same result. Messages of one kind between two ranks arrive in the
    order they were sent, so the next bucket's slices and the last one's average travel while this one is judged.
    This rank's own row stays in the bucket, where its average will be; the others' live in memory that is used
    again, as fresh pages cost as much time as the sums. Small Gramians go over the connections of another group
    of the same ranks, if there is one: on the group's own they would queue behind megabytes of gradients.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wire_dtype: torch.dtype | None = None,
        small_messages: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = group
        self._wire_dtype = wire_dtype
        self._small_messages = small_messages or group
        self._workspace = Workspace()
        self._travelling: dict[int, Tensor] = {}  # by bucket: what goes over the wire in its place

    def scatter(self, bucket: Tensor) -> Callable[[], Rows]:
        """Send this rank's slices; return a function that waits for W rows `(n,)`."""
        travelling = bucket
        if self._wire_dtype is not None:
            travelling = self._workspace.take(1, bucket.numel(), self._wire_dtype)[0].copy_(bucket)
            self._travelling[bucket.data_ptr()] = travelling
        slices = _slices(travelling, self._group.size())
        rank = self._group.rank()
        others = self._workspace.take(len(slices) - 1, len(slices[rank]), travelling.dtype).unbind()
        rows = [*others[:rank], slices[rank], *others[rank:]]
        finish = _swap(self._group, slices, rows, _SCATTER)

        def wait() -> Rows:
            finish()
            return rows

        return wait

    def sum(self, gramian: Tensor) -> Tensor:
        """Add up the slices' Gramians `(W, W)`: swapped whole while that is little, one hop, else all-reduced."""
        size = self._group.size()
        if size > MOST_SWAPPING:
            return triangle.all_reduce(gramian, self._group)
        received = gramian.new_empty(size, *gramian.shape)
        received[self._group.rank()] = gramian
        _swap(self._small_messages, [gramian] * size, received.unbind(), _SUM)()
        return received.sum(0)

    def gather(self, rows: Rows, average: Average, bucket: Tensor) -> Callable[[], None]:
        """Average this rank's slice where it is and send it to everyone's bucket `(N,)`."""
        travelling = self._travelling.pop(bucket.data_ptr(), bucket)
        slices = _slices(travelling, self._group.size())
        rank = self._group.rank()
        own = average.combine(rows, out=slices[rank])
        if len(rows) > 1:
            self._workspace.give_back(rows[rank - 1])  # another's row, in the memory of all others
        finish = _swap(self._group, [own] * len(slices), slices, _GATHER)

        def wait() -> None:
            finish()
            if travelling is not bucket:
                bucket.copy_(travelling)
                self._workspace.give_back(travelling)

        return wait


def _slices(bucket: Tensor, count: int) -> tuple[Tensor, ...]:
    """Cut a bucket into slices of about the same length; each begins a cache line, if the bucket does."""
    line = CACHE_LINE // bucket.element_size()
    lines = bucket.numel() // line
    starts = [i * lines // count * line for i in range(count)]
    return torch.split(bucket, [end - start for start, end in pairwise([*starts, bucket.numel()])])


def _swap(
    group: dist.ProcessGroup, sent: Sequence[Tensor], received: Sequence[Tensor], tag: int
) -> Callable[[], None]:
    """Send `sent[r]` to each other rank r, receive its tensor into `received[r]`; return the wait for both."""
    rank, size = group.rank(), group.size()
    others = [(rank + step) % size for step in range(1, size)]
    works = [dist.irecv(received[r], group=group, group_src=r, tag=tag) for r in reversed(others)]
    works += [dist.isend(sent[r], group=group, group_dst=r, tag=tag) for r in others]

    def finish() -> None:
        for work in works:
            if work is not None:
                work.wait()

    return finish


def _nothing() -> None:
    """Wait for what is there already, or comes in the order of the device's stream."""


# Tags: each kind of message has its own order, apart from the user's own messages in the same group.
_SCATTER, _SUM, _GATHER = 26_465, 26_466, 26_467
MOST_SWAPPING = 16  # ranks whose Gramians are swapped whole, in one hop, and not all-reduced


# Up to this many bytes in all, latency is a bucket's time on an accelerator (not measured yet). On the CPU
# gathering never won at W = 4, and is not used; at W = 2 it did up to 1 MB, where a bucket takes 0.1 to 3 ms:
# benchmarks/results/collectives_gloo_w2.json and _w4.json.
_LATENCY_BYTES = 65_536


class Exchanges:
    """The exchanges of one group, each made when first needed."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        wire_dtype: torch.dtype | None,
        small_messages: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = group
        self._small_messages = small_messages
        self._wire_dtype = wire_dtype if group.size() > 1 else None  # nothing travels
        self._made: dict[type, Exchange] = {}

    def choose(self, name: str, bucket: Tensor) -> Exchange:
        """Return the exchange called name; `"auto"` decides by device, W and bucket size, alike on every rank."""
        on_cpu = bucket.device.type == "cpu"
        small = self._group.size() * bucket.numel() * bucket.element_size() <= _LATENCY_BYTES
        kind: type[GatherExchange | ShardedExchange | PeerExchange]
        if name == "gather" or (name == "auto" and small and not on_cpu):
            kind = GatherExchange
        else:
            kind = PeerExchange if on_cpu else ShardedExchange
        if kind not in self._made:
            more = (self._small_messages,) if kind is PeerExchange else ()
            self._made[kind] = kind(self._group, self._wire_dtype, *more)
        return self._made[kind]
