"""What an operator is told without asking: warnings in the log, and an end to steps on which nothing agrees."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gaf_ddp.device import on_host
from gaf_ddp.reports import Report

_logger = logging.getLogger(__name__)
_LONG = 200  # steps in a row for which a rank must be out to be named
_QUIET = 1000  # steps between two such warnings


class Alarms:
    """One state's alarms. Counts on the device, and only where a limit is set."""

    def __init__(self) -> None:
        self._skips: Tensor | None = None  # (2,): steps in a row on which nothing agreed, and the most so far
        self._quiet_until = 0  # the step from which on ranks that are out are named again

    def count_step(self, agreed: Sequence[Tensor], limit: int | None) -> None:
        """Count a step by whether its decisions `()` agreed; on the CPU `require_agreement` at once."""
        if limit is None:
            return
        nothing = ~torch.stack(list(agreed)).any()
        if self._skips is None:
            self._skips = torch.zeros(2, dtype=torch.int64, device=nothing.device)
        # In place: what was made on one stream must not be freed while another stream still reads it.
        self._skips[0].add_(1).mul_(nothing)
        torch.maximum(self._skips[0], self._skips[1], out=self._skips[1])
        if on_host(nothing):
            self.require_agreement(limit)

    def require_agreement(self, limit: int | None) -> None:
        """Raise RuntimeError if nothing agreed in more steps in a row than the limit; a host sync if it is set."""
        most = 0 if self._skips is None or limit is None else int(self._skips[1])
        if limit is not None and most > limit:
            rule = f"max_consecutive_skips is {limit}"
            raise RuntimeError(f"{rule}, found {most} steps in a row on which no gradients agreed")

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

    def warn_of_ranks(self, report: Report) -> None:
        """Warn of the ranks that have been out for long, at most once in a thousand steps."""
        out = report.out_for(_LONG)
        # Where all are out, nothing agrees: the other warning says so.
        if not out or len(out) == len(report.ranks) or report.step < self._quiet_until:
            return
        self._quiet_until = report.step + _QUIET
        _logger.warning("gaf_ddp: left out for long, is it broken? %s", "; ".join(map(str, out)))
