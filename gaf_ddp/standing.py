"""Where each rank stands over a whole job: how often it was kept, how far it is, and since when it is out."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.agreement import Agreement
from gaf_ddp.meter import FARTHEST, most_pending
from gaf_ddp.reports import RankStanding, Report
from gaf_ddp.saved import require_numbers
from gaf_ddp.settings import require

_COUNTS = ("kept", "nonfinite", "overlong", "zero", "flipped")  # decisions
_OUT = ("first_out", "out_since", "longest_out")  # steps; -1 where there is none
# Of z over steps t, counted from the last one: their decayed number, and sums of t, t², z and z t.
_LINE = ("judged", "time", "time_squared", "distance", "distance_time")
_BY_RANK = (*_COUNTS, *_OUT, *_LINE)
_DECAY = 0.99  # per step, of what "now" means: some 100 steps
_LEAST_SPREAD = 200.0  # variance of the steps that a trend needs, in steps²: that of 50 steps in a row


class Standing:
    """What `Report` is made of, kept on the device: recording never waits for it, reading waits once.

    Starts anew with another world size. Memory: 13 W float64 numbers, and the decisions not yet added up.
    """

    def __init__(self) -> None:
        self._numbers: Tensor | None = None  # (13, W) float64, by _BY_RANK
        self._decisions = 0
        self._last = 0  # the last step added up
        self._pending: list[tuple[int, Sequence[Agreement]]] = []

    def record(self, step: int, agreements: Sequence[Agreement]) -> bool:
        """Add a step's decisions; return whether all that was recorded has been added up."""
        world = len(agreements[0].kept)
        if self._numbers is not None and self._numbers.shape[1] != world:
            self.__init__()  # type: ignore[misc]
        if self._pending and len(self._pending[0][1][0].kept) != world:
            self._pending = []
        self._pending.append((step, agreements))
        if sum(len(each) for _, each in self._pending) < most_pending(world):
            return False
        self._add_up()
        return True

    def report(self, step: int, hosts: Sequence[str]) -> Report:
        """Return where the ranks stand after so many steps; at one host sync."""
        numbers = self.state_dict()
        world = len(numbers["kept"])
        hosts = hosts if len(hosts) == world else [""] * world
        of_ranks = [{name: numbers[name][rank] for name in _BY_RANK} for rank in range(world)]
        ranks = [
            RankStanding(rank, hosts[rank], each["kept"] / self._decisions, *_line(each), **_counts(each))
            for rank, each in enumerate(of_ranks)
        ]
        return Report(step, self._decisions, ranks)

    def state_dict(self) -> dict[str, list[float]]:
        """Return all of it as plain numbers, lists of W or one, empty before the first decision: one host sync."""
        self._add_up()
        if self._numbers is None:
            return {name: [] for name in (*_BY_RANK, "decisions", "last")}
        numbers = dict(zip(_BY_RANK, self._numbers.tolist(), strict=True))
        return {**numbers, "decisions": [float(self._decisions)], "last": [float(self._last)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; ValueError if state is not what `state_dict` returns, nothing is changed then."""
        require_numbers("standing", state, _BY_RANK, ("decisions", "last"))
        numbers = [number for each in state.values() for number in each]
        sound = all(map(math.isfinite, numbers)) and all(number >= 1 for number in state["decisions"])
        require(sound, "standing must hold finite numbers, of one decision or more", state)
        self.__init__()  # type: ignore[misc]
        if state["kept"]:
            self._numbers = torch.tensor([state[name] for name in _BY_RANK], dtype=torch.float64)
            self._decisions, self._last = int(state["decisions"][0]), int(state["last"][0])

    def _add_up(self) -> None:
        pending, self._pending = self._pending, []
        # Runs of steps in a row that have as many decisions each; nearly always there is one.
        for _, run in groupby(enumerate(pending), lambda each: (each[1][0] - each[0], len(each[1][1]))):
            steps = [step for _, step in run]
            self._add(steps[0][0], len(steps), [agreement for _, step in steps for agreement in step])

    def _add(self, first: int, count: int, agreements: list[Agreement]) -> None:
        """Add the decisions of so many steps from the first one on, each with as many."""
        each = len(agreements) // count
        nobody = torch.zeros_like(agreements[0].kept)
        unknown = torch.full_like(agreements[0].cosine[0], torch.nan)

        def stacked(name: str, missing: Tensor = nobody) -> Tensor:  # (steps, decisions of each, W)
            values = [getattr(agreement, name) for agreement in agreements]
            return torch.stack([missing if value is None else value for value in values]).view(count, each, -1)

        kept, nonfinite, overlong = stacked("kept"), stacked("nonfinite"), stacked("overlong")
        zero = ~(stacked("voters") | nonfinite | overlong)
        counts = torch.stack([kept, nonfinite, overlong, zero, stacked("flipped")]).sum(
            (1, 2), dtype=torch.float64
        )
        last = first + count - 1
        if self._numbers is None:
            self._numbers = counts.new_zeros(len(_BY_RANK), counts.shape[1])
            self._numbers[5:7] = -1
            self._last = last
        self._numbers = self._numbers.to(counts)
        times = torch.arange(first, last + 1, dtype=torch.float64, device=counts.device)[:, None]
        self._numbers[:5] += counts
        # In place: numbers made on one stream must not be freed while another stream still reads them.
        self._numbers[5:8] = _longer(self._numbers[5:8], 2 * kept.sum(1) < each, times)
        self._numbers[8:] = _older(self._numbers[8:], last - self._last)
        self._numbers[8:] += _judged(stacked("distance", unknown), times[:, :, None] - last)
        self._decisions += len(agreements)
        self._last = last


def _longer(before: Tensor, out: Tensor, times: Tensor) -> Tensor:
    """Return first_out, out_since and longest_out `(3, W)` after steps `(S, 1)` that left out `(S, W)`."""
    first_out, out_since, longest_out = before
    last_in = torch.where(out_since < 0, times[0], out_since) - 1  # before these steps
    last_in = torch.where(out, last_in, times).cummax(0).values
    earliest = torch.where(out, times, torch.inf).amin(0)
    first_out = torch.where((first_out < 0) & (earliest < torch.inf), earliest, first_out)
    longest_out = torch.maximum(longest_out, (times - last_in).amax(0))
    return torch.stack([first_out, torch.where(out[-1], last_in[-1] + 1, -1), longest_out])


def _older(line: Tensor, steps: int) -> Tensor:
    """Return the sums of a line `(5, W)` so many steps later."""
    judged, time, time_squared, distance, distance_time = line
    later = [judged, time - steps * judged, time_squared - 2 * steps * time + steps**2 * judged]
    return _DECAY**steps * torch.stack([*later, distance, distance_time - steps * distance])


def _judged(z: Tensor, times: Tensor) -> Tensor:
    """Return the sums of a line `(5, W)` through distances `(S, D, W)` at times `(S, 1, 1)`, 0 for the last."""
    known = ~z.isnan()
    number = known * _DECAY**-times
    distance = number * torch.where(known, z, 0).clamp(max=FARTHEST)
    each = [number, number * times, number * times**2, distance, distance * times]
    return torch.stack(each).sum((1, 2))


def _line(rank: dict[str, float]) -> tuple[float | None, float | None]:
    """Return a rank's distance and trend."""
    if not rank["judged"]:
        return None, None
    distance, time = rank["distance"] / rank["judged"], rank["time"] / rank["judged"]
    spread = rank["time_squared"] / rank["judged"] - time**2
    if spread < _LEAST_SPREAD:
        return distance, None
    return distance, 100 * (rank["distance_time"] / rank["judged"] - distance * time) / spread


def _counts(rank: dict[str, float]) -> dict[str, Any]:
    numbers: dict[str, Any] = {name: int(rank[name]) for name in (*_COUNTS[1:], *_OUT)}
    return {name: None if number < 0 else number for name, number in numbers.items()}
