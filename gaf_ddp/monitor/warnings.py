"""What an operator is told without asking: warnings in the log, and an end to steps on which nothing agrees."""

import logging
from collections.abc import Mapping, Sequence

import torch

from gaf_ddp.monitor.report import Report
from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.runtime.hosts import machine

_logger = logging.getLogger(__name__)
_LONG = 200  # steps in a row for which a rank must be out to be named
_QUIET = 1000  # steps between two such warnings
_MANY_SKIPS = 50  # in a row
_SPOILT = 10  # steps in a row in which no rank has a finite gradient
_RARE = 20  # steps between two readings of held-out data, above which they are too few


class Alarms:
    """One state's alarms."""

    def __init__(self) -> None:
        self._skips = 0  # steps in a row on which nothing agreed
        self._quiet_until = 0  # the step from which on ranks that are out are named again
        self._equals_quiet_until = 0  # the same for ranks whose gradients are equal
        self._spoilt = 0  # steps in a row with gradients that are not finite,
        self._spoilt_first: tuple[int, list[int]] = (0, [])  # the first of them, and whose they were
        self._last_reading: int | None = None  # of held-out data, after so many steps
        self._warned_of_readings = False

    def count_step(self, agreed: bool, limit: int | None, speaks: bool) -> None:
        """Count a step; warn if nothing agreed in fifty in a row.

        Raises:
            RuntimeError: nothing agreed in more steps in a row than the limit.
        """
        self._skips = 0 if agreed else self._skips + 1
        if speaks and self._skips == _MANY_SKIPS:
            _logger.warning("gaf_ddp: nothing agreed in %d steps in a row, so nothing was learned.", self._skips)
        if limit is not None and self._skips > limit:
            rule = f"max_consecutive_skips is {limit}"
            raise RuntimeError(f"{rule}, found {self._skips} steps in a row on which no gradients agreed")

    def warn_of_skips(self, summary: Mapping[str, float]) -> None:
        """Warn if more than half of the decisions found no agreement."""
        if summary.get("gaf/skipped_fraction", 0.0) > 0.5:
            _logger.warning(
                "gaf_ddp: nothing agreed in %.0f %% of the decisions; %s",
                100 * summary["gaf/skipped_fraction"],
                "gradients are not finite: is wire_dtype float16, or the learning rate or loss scale too large?"
                if summary["gaf/nonfinite_fraction"] > 0.5
                else "raise tau or the batch size per rank",
            )

    def warn_of_nonfinite(self, step: int, hosts: Sequence[str], decisions: Sequence[Agreement]) -> None:
        """Warn where no rank has had a finite gradient for ten steps in a row; the parameters will not recover."""
        spoilt = torch.stack([each.nonfinite for each in decisions]).any(0)
        if not bool(spoilt.any()):
            self._spoilt = 0
            return
        if not self._spoilt:
            self._spoilt_first = step, spoilt.nonzero().flatten().tolist()
        self._spoilt += 1
        if self._spoilt == _SPOILT and bool(spoilt.all()):
            first, ranks = self._spoilt_first
            _logger.warning(
                "gaf_ddp: every rank's gradient has been NaN or infinite for steps. It began at step %d with rank %s. "
                "The parameters may be NaN: load a checkpoint. watch=True averages what is not finite, too.",
                first,
                ", ".join(_named(rank, hosts) for rank in ranks[:8]),
            )

    def warn_of_ranks(self, report: Report) -> None:
        """Warn of the ranks that have been out for long, at most once in a thousand steps."""
        if report.step < self._quiet_until:
            return
        out = report.out_for(_LONG)
        if out:
            self._quiet_until = report.step + _QUIET
            _logger.warning("gaf_ddp: left out for long, is it broken? %s", "; ".join(map(report.line, out)))

    def warn_of_equals(self, step: int, hosts: Sequence[str], decisions: Sequence[Agreement]) -> None:
        """Warn of ranks whose gradients have been equal for steps in a row, at most once in a thousand steps."""
        equal = decisions[-1].equal if decisions else None
        if equal is None or step < self._equals_quiet_until or not bool(equal.any()):
            return
        self._equals_quiet_until = step + _QUIET
        first = [rank for rank in range(len(equal)) if bool(equal[rank].any()) and not bool(equal[rank, :rank].any())]
        groups = [[rank, *equal[rank].nonzero().flatten().tolist()] for rank in first]
        said = "; ".join(" and ".join(f"rank {_named(rank, hosts)}" for rank in group) for group in groups)
        _logger.warning(
            "gaf_ddp: equal gradients for ten steps in a row: %s. Do they read the same data, as with a sampler "
            "that was not told the rank? They count as one voter.",
            said,
        )

    def warn_of_rare_readings(self, step: int) -> None:
        """Warn once if held-out data, which are read now, were last read too long ago."""
        since = 0 if self._last_reading is None else step - self._last_reading
        self._last_reading = step
        if since > _RARE and not self._warned_of_readings:
            self._warned_of_readings = True
            _logger.warning(
                "gaf_ddp: state.reference was called after %d steps; call it every 10 to %d. A verdict needs several "
                "readings: with one in 50 steps a bad majority stayed in for some 300 steps, in place of 140.",
                since,
                _RARE,
            )


def _named(rank: int, hosts: Sequence[str]) -> str:
    """Return a rank's number with its machine, if that is known."""
    return f"{rank} ({machine(hosts[rank])})" if rank < len(hosts) else str(rank)
