"""The records of one state: the last step's decisions, and the statistics over all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from gaf_ddp.alike import require_one
from gaf_ddp.monitor.pending import Pending
from gaf_ddp.monitor.statistics import Statistics
from gaf_ddp.rules.agreement import Agreement, unsound
from gaf_ddp.runtime.device import on_host


class Decision(NamedTuple):
    """One decision and the parameters it was about."""

    agreement: Agreement
    parameters: list[Tensor]


class Records:
    """What was decided, and what of it is still on its way from an accelerator."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.statistics = Statistics()
        self.followers: list[Callable[[list[Decision]], None]] = []  # each is told every step's decisions
        self._pending = Pending()

    def add_read(self, step: int, decision: Decision, limit: int | None, steps: int) -> None:
        """Add a decision on so many steps that is on the host."""
        self.decisions = [decision]
        self.statistics.record(step, [decision.agreement], limit, steps)

    def add(self, step: int, decided: list[Decision], numbers: list[Tensor], limit: int | None) -> None:
        """Add a step's decisions, with the numbers `(W,)` of the settings each rank decided by.

        On accelerators they are read with the next step's, and what is wrong with them is raised then.
        """
        self.decisions = decided
        for follower in self.followers:
            follower(decided)
        if decided:
            self._pending.push(step, [each.agreement for each in decided], numbers)
            self.read(limit, leave=0 if on_host(numbers[0]) else 1)

    def read(self, limit: int | None, leave: int = 0) -> None:
        """Read all but so many steps that are on their way.

        Raises:
            ValueError: ranks decided by unlike settings, or a weighting returned what is no weight.
            RuntimeError: nothing agreed in more steps in a row than the limit.
        """
        while len(self._pending) > leave:
            step, decisions, numbers = self._pending.pop()
            for each in numbers:
                require_one(each)
            wrong = sum(bool(unsound(each.weights, each.voters)) for each in decisions)
            if wrong:
                found = f"others in {wrong} decision{'s' * (wrong > 1)}"
                raise ValueError(f"weighting must return finite weights >= 0, found {found}")
            self.statistics.record(step, decisions, limit)

    def __getstate__(self) -> dict[str, Any]:
        """Return the statistics: decisions belong to this process."""
        return {"decisions": [], "statistics": self.statistics, "followers": [], "_pending": Pending()}
