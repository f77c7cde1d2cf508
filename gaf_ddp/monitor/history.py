"""Where each rank stands over a whole job: how far it is from the consensus, and since when it is out."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.monitor.report import RankStanding, Report
from gaf_ddp.monitor.saved import require_numbers
from gaf_ddp.monitor.totals import FARTHEST, Sums, kept_shares, stacked
from gaf_ddp.rules.agreement import Agreement

_OUT = ("first_out", "out_since", "longest_out")  # steps; -1 where there is none
_VERDICTS = ("trusted_since", "condemned_since")  # the same, by held-out data
# Of z over steps t, counted from the last one: their decayed number, and sums of t, t², z and z t.
_LINE = ("judged", "time", "time_squared", "distance", "distance_time")
_BY_RANK = (*_OUT, *_LINE, *_VERDICTS)
_COUNTS = ("nonfinite", "overlong", "zero", "flipped", "finished")
_DECAY = 0.99  # per step, of what "now" means: some 100 steps
_LEAST_SPREAD = 200.0  # variance of the steps that a trend needs, in steps²: that of 50 steps in a row


class History:
    """Absences and the line through each rank's distances, on the host. Memory: 10 W float64 numbers.

    A rank is absent in a step that left it out in most of its decisions while others were kept: where nothing
    agreed, nobody is absent, nor is who has finished (DDP's Join). Starts anew with another world size.
    """

    def __init__(self) -> None:
        self._numbers: Tensor | None = None  # (10, W) float64, by _BY_RANK
        self._last = 0  # the last step added

    def add(self, step: int, decisions: Sequence[Agreement]) -> None:
        """Add a step's decisions."""
        kept, z = stacked(decisions, "kept"), stacked(decisions, "distance").double()
        if self._numbers is None or self._numbers.shape[1] != kept.shape[1]:
            self._numbers = torch.zeros(len(_BY_RANK), kept.shape[1], dtype=torch.float64)
            self._numbers[[0, 1, -2, -1]] = -1
            self._last = step
        finished = stacked(decisions, "finished").all(0)
        out = (2 * kept.sum(0) < len(decisions)) & kept.any() & ~finished
        self._numbers[:3] = _longer(self._numbers[:3], out, step)
        self._numbers[3:8] = _older(self._numbers[3:8], step - self._last)
        known = ~z.isnan()
        self._numbers[3] += known.sum(0)
        self._numbers[6] += torch.where(known, z, 0).clamp(max=FARTHEST).sum(0)
        for row, name in zip((-2, -1), ("trusted", "condemned"), strict=True):
            self._numbers[row] = _since(self._numbers[row], stacked(decisions, name).all(0), step)
        self._last = step

    def report(self, step: int, hosts: Sequence[str], totals: Sums, max_norm_ratio: float | None = None) -> Report:
        """Return where the ranks stand after so many steps, given the sums of all decisions."""
        numbers = self.read()
        world, decisions = len(numbers["first_out"]), sum(totals["decisions"])
        hosts = hosts if len(hosts) == world else [""] * world
        ranks, shares = [], kept_shares(totals) if decisions else []
        for rank, share in enumerate(shares):
            each = {name: numbers[name][rank] for name in _BY_RANK}
            found: dict[str, Any] = {name: int(totals[name][rank]) for name in _COUNTS}
            found |= {name: None if each[name] < 0 else int(each[name]) for name in (*_OUT[:2], *_VERDICTS)}
            found |= {"kept": None if math.isnan(share) else share, "longest_out": int(each["longest_out"])}
            found |= zip(("distance", "trend"), _line(each), strict=True)
            ranks.append(RankStanding(rank, hosts[rank], **found))
        return Report(step, int(decisions), ranks, max_norm_ratio)

    def read(self) -> Sums:
        """Return all of it as plain numbers, lists of W or one; empty before the first decision."""
        if self._numbers is None:
            return {name: [] for name in (*_BY_RANK, "last")}
        return {**dict(zip(_BY_RANK, self._numbers.tolist(), strict=True)), "last": [float(self._last)]}

    def load(self, state: Any) -> None:
        """Restore what `read` returned; ValueError if it is something else, nothing is changed then."""
        require_numbers("history", state, _BY_RANK, ("last",))
        self.__init__()  # type: ignore[misc]
        if state["first_out"]:
            self._numbers = torch.tensor([state[name] for name in _BY_RANK], dtype=torch.float64)
            self._last = int(state["last"][0])


def _longer(before: Tensor, out: Tensor, step: int) -> Tensor:
    """Return first_out, out_since and longest_out `(3, W)` after a step that left out `(W,)`."""
    first_out, out_since, longest_out = before
    since = _since(out_since, out, step)
    first_out = torch.where(out & (first_out < 0), float(step), first_out)
    return torch.stack([first_out, since, torch.where(out, longest_out.maximum(step + 1 - since), longest_out)])


def _since(before: Tensor, holds: Tensor, step: int) -> Tensor:
    """Return since which step it holds `(W,)`, -1 where it does not, after a step in which it holds for `(W,)`."""
    return torch.where(holds, torch.where(before < 0, float(step), before), -1.0)


def _older(line: Tensor, steps: int) -> Tensor:
    """Return the sums of a line `(5, W)` so many steps later."""
    judged, time, time_squared, distance, distance_time = line
    later = [judged, time - steps * judged, time_squared - 2 * steps * time + steps**2 * judged]
    return _DECAY**steps * torch.stack([*later, distance, distance_time - steps * distance])


def _line(rank: dict[str, float]) -> tuple[float | None, float | None]:
    """Return a rank's distance and trend."""
    if not rank["judged"]:
        return None, None
    distance, time = rank["distance"] / rank["judged"], rank["time"] / rank["judged"]
    spread = rank["time_squared"] / rank["judged"] - time**2
    if not spread >= _LEAST_SPREAD or not math.isfinite(distance):
        return distance, None
    return distance, 100 * (rank["distance_time"] / rank["judged"] - distance * time) / spread
