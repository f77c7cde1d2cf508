"""The sharded exchange over plain sends and receives, for gloo on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.exchange.workspace import CACHE_LINE, Workspace
from gaf_ddp.kernels.gram import Rows, combine
from gaf_ddp.runtime.collectives import all_reduce_gramian

MOST_SWAPPING = 16  # ranks whose Gramians are swapped whole, in one hop, and not all-reduced

# Tags: each kind of message has its own order, apart from the user's own messages in the same group.
_SCATTER, _SUM, _GATHER, _MEET, SKETCH = range(26_465, 26_470)


class PeerExchange:
    """`ShardedExchange` without collectives: same bytes, same result.

    Gloo's all-gather runs through a second full buffer; sends straight out of the bucket and receives straight
    into it need none, nor padding. Messages of one kind between two ranks arrive in the order they were sent, so
    the next bucket's slices and the last one's average travel while this one is judged. This rank's own row stays
    in the bucket, where its average will be; the others' live in memory that is used again, as fresh pages cost as
    much time as the sums. Small Gramians go over the connections of another group of the same ranks, if there is
    one: on the group's own they would queue behind megabytes of gradients.
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
        finish = swap(self._group, slices, rows, _SCATTER)

        def wait() -> Rows:
            finish()
            return rows

        return wait

    def sum(self, measured: Tensor) -> Tensor:
        """Add up what was measured on the slices."""
        return sum_small(measured, self._small_messages)

    def gather(self, rows: Rows, weights: Tensor, bucket: Tensor) -> Callable[[], None]:
        """Average this rank's slice where it is and send it to everyone's bucket `(N,)`."""
        travelling = self._travelling.pop(bucket.data_ptr(), bucket)
        slices = _slices(travelling, self._group.size())
        rank = self._group.rank()
        own = combine(rows, weights, out=slices[rank])
        if len(rows) > 1:
            self._workspace.give_back(rows[rank - 1])  # another's row, in the memory of all others
        finish = swap(self._group, [own] * len(slices), slices, _GATHER)

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


def meet(group: dist.ProcessGroup, flags: Sequence[bool] = ()) -> list[bool]:
    """Wait until every rank has come this far, and name one that died: other waits end by the time-out alone.

    Return which of the flags all ranks have set.
    """
    tokens = torch.empty(group.size(), 1 + len(flags), dtype=torch.uint8)
    tokens[group.rank()] = torch.tensor([True, *flags])
    swap(group, [tokens[group.rank()]] * group.size(), tokens.unbind(), _MEET)()
    return tokens.bool().all(0).tolist()[1:]


def sum_small(measured: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add up what was measured: swapped whole while that is little, in one hop in place of a ring's 2 (W - 1)."""
    size = group.size()
    if size > MOST_SWAPPING:
        return all_reduce_gramian(measured, group)
    received = measured.new_empty(size, *measured.shape)
    received[group.rank()] = measured
    swap(group, [measured] * size, received.unbind(), _SUM)()
    return received.sum(0)


def swap(group: dist.ProcessGroup, sent: Sequence[Tensor], received: Sequence[Tensor], tag: int) -> Callable[[], None]:
    """Send `sent[r]` to each other rank r, receive its tensor into `received[r]`; return the wait for both."""
    rank, size = group.rank(), group.size()
    others = [(rank + step) % size for step in range(1, size)]
    works: list[tuple[int, dist.Work | None]] = []
    for other in reversed(others):
        with _with(other, rank):
            works.append((other, dist.irecv(received[other], group=group, group_src=other, tag=tag)))
    for other in others:
        with _with(other, rank):
            works.append((other, dist.isend(sent[other], group=group, group_dst=other, tag=tag)))

    def finish() -> None:
        for other, work in works:
            with _with(other, rank):
                if work is not None:
                    work.wait()

    return finish


@contextmanager
def _with(other: int, rank: int) -> Iterator[None]:
    """Let what is raised on a message between two ranks name them: gloo names addresses at best."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank} lost rank {other}: {error}") from error
