"""What `check_every` asks of ballots: equal parameters, and averages that are those of the gradients."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gaf_ddp.checks.replicas import require_equal
from gaf_ddp.checks.sums import SumCheck, require_sums
from gaf_ddp.kernels.hash import hash_bits

if TYPE_CHECKING:
    from gaf_ddp.ballots.ballot import Numbers
    from gaf_ddp.ballots.count import Sent
    from gaf_ddp.state import GAFState


class BallotChecks:
    """The checks of one model's ballots.

    Args:
        state: its `check_every` and sketch size, and the ranks' hosts.
        sums: whether averages are seen, and can be checked.

    Attributes:
        sums: of the averages of the steps that go into the ballot, or None.
        hash: of the parameters' bits, int64 `()` on the device, or None.
        off: how far the last ballots' sum was off, `()` float64 on the device, or None.
    """

    def __init__(self, state: "GAFState", sums: bool) -> None:
        self._every, self._size, self._sees_sums = state.check_every, state.sketch_size, sums
        self._hosts = state._records.statistics.hosts
        self.sums: SumCheck | None = None
        self.hash: Tensor | None = None
        self.off: Tensor | None = None
        self._checked: SumCheck | None = None  # of the last ballots

    def begin_step(
        self, step: int, is_first: bool, steps: int, parameters: Sequence[Tensor], device: torch.device
    ) -> None:
        """Hash the parameters if it is time to, and check a ballot of so many steps as a whole or not at all."""
        if self._every is None:
            return
        if step % self._every == 0:
            self.hash = hash_bits(parameters, device)
        if self._sees_sums and is_first and -step % self._every < steps:
            self.sums = SumCheck(self._size)

    def begin_ballot(self) -> None:
        """Forget what went into the last one."""
        self.sums, self.hash = None, None

    def require(self, numbers: "Numbers", step: int) -> None:
        """Raise RuntimeError, on every rank, if a sum was not that of the gradients, or parameters differ."""
        checked = self._checked
        require_sums(numbers.off.tolist(), self._hosts, lambda: [] if checked is None else checked.suspects())
        require_equal(numbers.hashes, numbers.finished, self._hosts, step)  # what a wrong sum leads to

    def compare(self, sent: "Sent", numbers: "Numbers", guarded: bool) -> None:
        """Compare the averages of what was sent with its sketches, for the next ballot to tell."""
        self.off, self._checked = None, None if guarded else sent.check
        if self._checked is not None:
            self.off = self._checked.off(numbers.squares.sum(1).sqrt()[sent.counted].tolist())
