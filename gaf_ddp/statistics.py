"""What a state saw: running statistics, where each rank stands, and the alarms that follow from both."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gaf_ddp.agreement import Agreement
from gaf_ddp.alarms import Alarms
from gaf_ddp.device import on_host
from gaf_ddp.hosts import machine
from gaf_ddp.meter import AgreementMeter
from gaf_ddp.reports import Report
from gaf_ddp.standing import Standing


class Statistics:
    """Of one state. Recording never waits for the device, reading does."""

    def __init__(self) -> None:
        self.hosts: list[str] = []  # of the ranks, once they have met
        self.speaks = True  # whether this rank warns for all, which know the same
        self._meter, self._standing, self._alarms = AgreementMeter(), Standing(), Alarms()

    def record(self, step: int, decided: Sequence[tuple[Agreement, Tensor]], limit: int | None) -> None:
        """Add a step's decisions, each with the numbers `(W,)` of the ranks' settings; see `Alarms` for limit."""
        agreements = [agreement for agreement, _ in decided]
        self._meter.record(decided)
        self._alarms.count_step([agreement.agreed for agreement in agreements], limit)
        if self._standing.record(step, agreements) and on_host(agreements[0].kept):
            self.report(step + 1, limit)  # which warns

    def require_sound(self, limit: int | None) -> None:
        """Raise what accelerators can only tell once the host waits for them."""
        self._meter.require_sound()
        self._alarms.require_agreement(limit)

    def summary(self, step: int, limit: int | None, reset: bool) -> dict[str, float]:
        """Return what `GAFState.summary` promises, after so many steps."""
        summary = self._meter.summary()
        if self.speaks:
            self._alarms.warn_of_skips(summary)
        ranks = self.report(step, limit).ranks if summary else []
        if reset:
            self._meter.reset()
        out = [0 if rank.out_since is None else step - rank.out_since for rank in ranks]
        return {**summary, **{f"gaf/out_rank_{rank:02d}": float(steps) for rank, steps in enumerate(out)}}

    def report(self, step: int, limit: int | None) -> Report:
        """Return where the ranks stand after so many steps."""
        self._alarms.require_agreement(limit)
        report = self._standing.report(step, [machine(host) for host in self.hosts])
        if self.speaks:
            self._alarms.warn_of_ranks(report)
        return report

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """Return it as plain numbers, the same keys always."""
        return {"meter": self._meter.state_dict(), "standing": self._standing.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it from a dict that holds it; ValueError if it does not, nothing is changed then."""
        meter, standing = AgreementMeter(), Standing()
        meter.load_state_dict(state["meter"])
        standing.load_state_dict(state["standing"])
        self._meter, self._standing = meter, standing
