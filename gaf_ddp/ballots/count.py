"""Counting ballots: behind the gather on accelerators, and from there to the host, which reads them a step later."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaf_ddp.ballots.ballot import unpack
from gaf_ddp.ballots.places import Key
from gaf_ddp.checks.sums import SumCheck
from gaf_ddp.runtime.device import beside_backward, read_here, side_stream

Tally = Callable[[Tensor], Tensor]  # from all ranks' sketches (W, k) to what the host needs of them


class Counting:
    """All ranks' ballots of one step on their way to the host.

    On accelerators they are counted at once, on one stream for all steps, behind the gather: so that momenta of one
    step are there for the next, in memory that no other stream is given meanwhile. (Futures' callbacks come on another
    stream each time.) The host goes on.

    Args:
        work: the gather, under way.
        own: this rank's ballot.
        rows: all ranks' ballots `(W, …)`, once it is done.
        size: numbers of a ballot's sketches.
        tally: launches what is done with the sketches.

    Attributes:
        work: the gather on CPU groups, else None.
    """

    def __init__(self, work: Any, own: Tensor, rows: Tensor, size: int, tally: Tally) -> None:
        self.work: Any = work if rows.device.type == "cpu" else None
        self._rows, self._size, self._tally = rows, size, tally
        self._copies: list[Tensor] = []
        self._event: Any = None
        if rows.device.type != "cpu":
            with beside_backward(rows.device):
                work.wait()  # the stream does, for the gather; from here on `work` no longer holds what it reads
                for each in (own, rows):
                    read_here(each)
                self._count_on_device()

    def read(self) -> tuple[Tensor, Tensor]:
        """Wait for the ballots; return what the tally made of them, and their numbers `(W, …)`, on the host."""
        if self._event is None:
            self.work.wait()
            return self._count()
        self._event.synchronize()
        products, numbers = self._copies
        return products, numbers

    def _count(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            sketches, numbers = unpack(self._rows, self._size)
            return self._tally(sketches), numbers

    def _count_on_device(self) -> None:
        found = self._count()
        self._copies = [torch.empty_like(each, device="cpu", pin_memory=True) for each in found]
        for copy, each in zip(self._copies, found, strict=True):
            copy.copy_(each, non_blocking=True)
        self._event = torch.Event(self._rows.device)
        self._event.record(side_stream(self._rows.device))


class Sent(NamedTuple):
    """Ballots on their way, and what held in the steps that they are about.

    Attributes:
        step: the last one of these.
        steps: how many.
        keys: their buckets.
        counted: bool `(W,)`, who counted in them.
        check: of their averages, if those are checked.
        counting: what the ballots make of it.
    """

    step: int
    steps: int
    keys: list[Key]
    counted: Tensor
    check: SumCheck | None
    counting: Counting
