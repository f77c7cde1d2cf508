"""Sums over all decisions since training began; what happened between two moments is their difference."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.monitor.saved import require_numbers
from gaf_ddp.rules.agreement import Agreement

Sums = dict[str, list[float]]

# Decisions in which a rank was that; those that know its distance, and the sum of these.
BY_RANK = ("kept", "nonfinite", "overlong", "zero", "flipped", "finished", "judged", "distance")
# Decisions; those that kept nothing; those with a mean cosine, and the sum of these.
IN_ALL = ("decisions", "skipped", "paired", "cosine")
FARTHEST = 100.0  # what a z beyond it counts as: one of 1e20 would hide all others


class Totals:
    """Running sums over decisions of the same ranks, on the host. Memory: 8 W + 4 float64 numbers."""

    def __init__(self) -> None:
        self._by_rank = torch.zeros(len(BY_RANK), 0, dtype=torch.float64)
        self._in_all = torch.zeros(len(IN_ALL), dtype=torch.float64)

    def add(self, decisions: Sequence[Agreement]) -> None:
        """Add decisions over the same W ranks; with another W all begins anew."""
        by_rank, in_all = _sums(decisions)
        if self._by_rank.shape != by_rank.shape:
            self._by_rank, self._in_all = torch.zeros_like(by_rank), torch.zeros_like(in_all)
        self._by_rank += by_rank
        self._in_all += in_all

    def read(self) -> Sums:
        """Return the sums as plain numbers, lists of W or one; empty before the first decision."""
        if not self._in_all[0]:
            return {name: [] for name in (*BY_RANK, *IN_ALL)}
        by_rank = dict(zip(BY_RANK, self._by_rank.tolist(), strict=True))
        return {**by_rank, **{name: [each] for name, each in zip(IN_ALL, self._in_all.tolist(), strict=True)}}

    def load(self, sums: Any) -> None:
        """Restore what `read` returned; ValueError if it is something else, nothing is changed then."""
        require_numbers("totals", sums, BY_RANK, IN_ALL)
        self.__init__()  # type: ignore[misc]
        if sums["kept"]:
            self._by_rank = torch.tensor([sums[name] for name in BY_RANK], dtype=torch.float64)
            self._in_all = torch.tensor([sums[name][0] for name in IN_ALL], dtype=torch.float64)


def between(before: Mapping[str, list[float]], now: Sums) -> Sums:
    """Return what was added between two readings; all of it where the sums began anew."""
    if len(before["kept"]) != len(now["kept"]) or sum(before["decisions"]) > sum(now["decisions"]):
        return now
    return {name: [late - early for late, early in zip(each, before[name], strict=True)] for name, each in now.items()}


def summary(sums: Sums) -> dict[str, float]:
    """Return the means over the decisions in the sums; empty if there are none.

    `GAFState.summary` says what the keys mean, and adds `gaf/out_rank_00` … and `gaf/noise_scale` (`monitor.noise`).
    """
    decisions = sum(sums["decisions"])
    if not decisions:
        return {}
    shares = {name: [number / decisions for number in sums[name]] for name in BY_RANK}
    kept, present = kept_shares(sums), len(sums["kept"]) * decisions - sum(sums["finished"])
    judged = any(sums["judged"])
    distances = [z / n if n else float("nan") for z, n in zip(sums["distance"], sums["judged"], strict=True)]
    mean = {name: sum(share) / len(share) for name, share in shares.items()}
    (skipped,), (cosine,), (paired,) = sums["skipped"], sums["cosine"], sums["paired"]
    return {
        "gaf/kept_fraction": sum(sums["kept"]) / present if present else float("nan"),
        "gaf/skipped_fraction": skipped / decisions,
        "gaf/mean_cosine": cosine / paired if paired else float("nan"),
        **{f"gaf/{name}_fraction": mean[name] for name in ("nonfinite", "overlong", "zero")},
        **{f"gaf/kept_rank_{rank:02d}": share for rank, share in enumerate(kept)},
        **{f"gaf/distance_rank_{rank:02d}": z for rank, z in enumerate(distances) if judged},
    }


def kept_shares(sums: Sums) -> list[float]:
    """Return of each rank the share of decisions that kept it, of those for which it had not finished, or NaN."""
    (decisions,) = sums["decisions"]
    present = [decisions - finished for finished in sums["finished"]]
    return [kept / number if number else float("nan") for kept, number in zip(sums["kept"], present, strict=True)]


def stacked(decisions: Sequence[Agreement], name: str) -> Tensor:
    """Return one field of D decisions `(D, …)`; NaN or false where one has none."""
    values = [getattr(decision, name) for decision in decisions]
    known = next((value for value in values if value is not None), None)
    if known is None:
        shape = len(decisions), len(decisions[0].kept)
        return torch.full(shape, torch.nan) if name == "distance" else torch.zeros(shape, dtype=torch.bool)
    missing = torch.full_like(known, torch.nan) if known.is_floating_point() else torch.zeros_like(known)
    return torch.stack([missing if value is None else value for value in values])


def zeros(decisions: Sequence[Agreement]) -> Tensor:
    """Return whose gradient was zero, not for want of inputs, bool `(D, W)`."""
    voters, nonfinite, overlong, finished = (
        stacked(decisions, name) for name in ("voters", "nonfinite", "overlong", "finished")
    )
    return ~(voters | nonfinite | overlong | finished)


def _sums(decisions: Sequence[Agreement]) -> tuple[Tensor, Tensor]:
    """Return what D decisions over W ranks add, `(8, W)` and `(4,)`."""
    voters, cosine = stacked(decisions, "voters"), stacked(decisions, "cosine").double()  # (D, W), (D, W, W)
    number = voters.sum(1, dtype=torch.float64)
    pairs = number * (number - 1)
    cosines = (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / pairs.clamp(min=1)
    counts = [stacked(decisions, name) for name in ("kept", "nonfinite", "overlong", "flipped", "finished")]
    counts.insert(3, zeros(decisions))
    z = stacked(decisions, "distance").double()
    by_rank = [*(count.sum(0).double() for count in counts), (~z.isnan()).sum(0).double()]
    by_rank.append(z.clamp(max=FARTHEST).nansum(0))
    skipped = ~stacked(decisions, "agreed")
    in_all = [torch.ones_like(pairs).sum(), skipped.sum().double(), (pairs > 0).sum().double(), cosines.sum()]
    return torch.stack(by_rank), torch.stack(in_all)
