"""Counting ballots: behind the gather on accelerators, and from there to the host, which reads them a step later."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaf_ddp.ballots.ballot import unpack
from gaf_ddp.ballots.places import Key
from gaf_ddp.checks.sums import SumCheck

Tally = Callable[[Tensor], Tensor]  # from all ranks' sketches (W, k) to what the host needs of them


class Counting:
    """All ranks' ballots of one step on their way to the host.

    Args:
        work: the gather, under way.
        rows: all ranks' ballots `(W, …)`, once it is done.
        size: k, numbers of a sketch.
        tally: launches what is done with the sketches.
    """

    def __init__(self, work: Any, rows: Tensor, size: int, tally: Tally) -> None:
        self._rows, self._size, self._tally = rows, size, tally
        self._copies: list[Tensor] = []
        self._event: Any = None
        # On accelerators the callback runs here and now, on a stream that waits for the gather; the host goes on.
        self._work = work if rows.device.type == "cpu" else work.get_future().then(self._count_on_device)

    def read(self) -> tuple[Tensor, Tensor]:
        """Wait for the ballots; return what the tally made of them, and their numbers `(W, …)`, on the host."""
        self._work.wait()
        if self._event is None:
            return self._count()
        self._event.synchronize()
        products, numbers = self._copies
        return products, numbers

    def _count(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            sketches, numbers = unpack(self._rows, self._size)
            return self._tally(sketches), numbers

    def _count_on_device(self, _: Any) -> None:
        found = self._count()
        self._copies = [torch.empty_like(each, device="cpu", pin_memory=True) for each in found]
        for copy, each in zip(self._copies, found, strict=True):
            copy.copy_(each, non_blocking=True)
        self._event = torch.Event(found[0].device)
        self._event.record(torch.get_device_module(found[0].device).current_stream(found[0].device))


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
