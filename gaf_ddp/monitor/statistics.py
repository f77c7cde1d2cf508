"""What a state saw: sums, where each rank stands, and the alarms that follow from both; plain numbers on the host."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gaf_ddp.monitor.history import History
from gaf_ddp.monitor.noise import NoiseScale
from gaf_ddp.monitor.report import Report
from gaf_ddp.monitor.totals import Sums, Totals, between, summary
from gaf_ddp.monitor.warnings import Alarms
from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.runtime.hosts import machine

_CHECKED = 64  # steps between looks at who has been out for long, when nobody asks


class Statistics:
    """Of one state."""

    def __init__(self) -> None:
        self.hosts: list[str] = []  # of the ranks, once they have met
        self.speaks = True  # whether this rank warns for all, which know the same
        self.voter_of: Tensor | None = None  # (W,), of each rank, where a voter is several
        self._totals, self._history, self._alarms, self._noise = Totals(), History(), Alarms(), NoiseScale()
        self.began = self._reset = self._totals.read()  # the sums when this process began, and at the last reset
        self._looked = 0  # at who has been out for long, after so many steps

    def record(self, step: int, decisions: Sequence[Agreement], limit: int | None, steps: int = 1) -> None:
        """Add the decisions on so many steps, on the host; one on gradients that were all zero is none.

        Raises:
            RuntimeError: nothing agreed in more steps in a row than the limit.
        """
        decisions = [each for each in decisions if bool((each.voters | each.nonfinite | each.overlong).any())]
        if decisions:
            if len(self._reset["kept"]) != len(decisions[0].kept):  # all begins anew
                self._reset = Totals().read()
            self._totals.add(decisions)
            self._history.add(step, decisions)
            self._noise.add(step, decisions, self.voter_of, steps)
            self._alarms.count_step(any(bool(each.agreed) for each in decisions), limit, self.speaks)
            if self.speaks:
                self._alarms.warn_of_nonfinite(step, self.hosts, decisions)
        if self.speaks and (step + 1) // _CHECKED != self._looked // _CHECKED:
            self._looked = step + 1
            self._alarms.warn_of_ranks(self.report(step + 1))
            self._alarms.warn_of_equals(step, self.hosts, decisions)

    def note_reading(self, step: int) -> None:
        """Note that held-out data are read after so many steps."""
        if self.speaks:
            self._alarms.warn_of_rare_readings(step)

    def summary(self, step: int, reset: bool, max_norm_ratio: float | None = None) -> dict[str, float]:
        """Return what `GAFState.summary` promises, after so many steps; the ratio is for the words of warnings."""
        now = self._totals.read()
        found = summary(between(self._reset, now))
        report = self.report(step, max_norm_ratio)
        if self.speaks:
            self._alarms.warn_of_skips(found)
            self._alarms.warn_of_ranks(report)
        if reset:
            self._reset = now
        out = [0 if rank.out_since is None else step - rank.out_since for rank in report.ranks if found]
        if found:
            found["gaf/noise_scale"] = self._noise.value
        return {**found, **{f"gaf/out_rank_{rank:02d}": float(steps) for rank, steps in enumerate(out)}}

    def report(self, step: int, max_norm_ratio: float | None = None) -> Report:
        """Return where the ranks stand after so many steps; the ratio is for its words."""
        hosts = [machine(host) for host in self.hosts]
        return self._history.report(step, hosts, self._totals.read(), max_norm_ratio)

    @property
    def noise_scale(self) -> float:
        """The gradient noise scale, in batches of one rank; NaN where it is not known."""
        return self._noise.value

    def sums(self) -> Sums:
        """Return the sums of all decisions so far."""
        return self._totals.read()

    def state_dict(self) -> dict[str, Sums]:
        """Return it as plain numbers, the same keys always."""
        history, noise = self._history.read(), self._noise.read()
        return {"totals": self._totals.read(), "reset": self._reset, "history": history, "noise": noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it from a dict that holds it; ValueError if it does not, nothing is changed then."""
        totals, reset, history, noise = Totals(), Totals(), History(), NoiseScale()
        totals.load(state["totals"])
        reset.load(state["reset"])
        history.load(state["history"])
        noise.load(state["noise"])
        self._totals, self._history, self._noise = totals, history, noise
        self.began, self._reset = totals.read(), reset.read()
