"""The strongest rules of ByzFL and ByzPy, and ByzFL's attacks, as this benchmark calls them.

The packages are optional, `pip install "gaf-ddp[evidence]"`.

Their rules are told the number f of bad ranks, which nobody knows. Mixing is a weighting, and weights are what the
hook and the tables are told, so they are read off: every vector carries a small mark of its own, and the result
shows how much of each there is. The others are no weightings: they see the gradients themselves.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.declare import Run
from gaf_ddp.rules.weighting import present

Average = Callable[[Tensor], Tensor]  # from gradients (W, n) to (n,)
RULES = ("mixing", "clipping", "smea", "caf")
ATTACKS = ("SignFlipping", "InnerProductManipulation", "ALittleIsEnough", "Mimic", "Inf")
_MARK = 1e-4  # in units of the longest vector; adds the same to all distances between two of them


def at_hand() -> bool:
    """Return whether ByzFL and ByzPy are installed."""
    return all(find_spec(package) for package in ("byzfl", "byzpy"))


def needed_by(run: Run) -> bool:
    """Return whether a run, or the run that it repeats, is of their rules, or one of the attacks is on it."""
    rule = run.rule.like or run.rule
    return rule.name in RULES or (run.fault is not None and run.fault.kind in ATTACKS)


def attack(kind: str) -> Callable[[Tensor], Tensor]:
    """Return one of its attacks with its own settings: from the honest gradients `(H, n)` what attackers send."""
    import byzfl

    send: Callable[[Tensor], Tensor] = getattr(byzfl, kind)()
    return send


def mixing(bad: int) -> Callable[[Tensor], Tensor]:
    """Return the weights of nearest-neighbour mixing and multi-Krum behind it, told that `bad` ranks are bad.

    Where a step has too few voters for that number, it is told the largest that they allow.
    """
    from byzfl import NNM, MultiKrum

    def weigh(gramian: Tensor) -> Tensor:
        voters = present(gramian)
        count = int(voters.sum())
        most = min(bad, max(count - 1, 0) // 2)
        weights = torch.zeros(len(gramian), dtype=torch.float64)
        if count:
            vectors = _vectors(gramian[voters][:, voters])
            mark = _MARK * vectors.norm(dim=1).max()
            marked = torch.cat([vectors, mark * torch.eye(count, dtype=torch.float64)], dim=1)
            weights[voters] = MultiKrum(most)(NNM(most)(marked))[-count:].double() / mark  # it adds up in float32
        return weights.to(gramian)

    return weigh


def average_of(name: str, parameter: float | None) -> Average | None:
    """Return the rule of that name that sees gradients `(W, n)` themselves; None where there is none such."""
    return AVERAGES[name](parameter) if name in AVERAGES and parameter is not None else None


def clipping(radius: float) -> Average:
    """Return ByzFL's centred clipping around its last result: one round, as its authors train."""
    from byzfl import CenteredClipping

    aggregate: Average = CenteredClipping(tau=radius)
    return aggregate


def smea(bad: float) -> Average:
    """Return the mean of the W - f gradients with the smallest largest eigenvalue (ByzPy's SMEA)."""
    from byzpy.aggregators.geometric_wise.smea import SMEA

    return _of_finite(SMEA, int(bad))


def caf(bad: float) -> Average:
    """Return ByzPy's covariance-bound agnostic filter, which weighs down what makes the covariance large."""
    from byzpy.aggregators.norm_wise.caf import CAF

    return _of_finite(CAF, int(bad))


def _of_finite(aggregator: Callable[[int], Any], bad: int) -> Average:
    """Return a rule over the gradients that are finite; it is told at most as many bad ranks as those allow."""

    def average(rows: Tensor) -> Tensor:
        voters = [row for row in rows if bool(row.isfinite().all())]
        if not voters:
            return torch.zeros_like(rows[0])
        result: Tensor = aggregator(min(bad, (len(voters) - 1) // 2)).aggregate(voters)
        return result

    return average


AVERAGES: dict[str, Callable[[float], Average]] = {"clipping": clipping, "smea": smea, "caf": caf}


def _vectors(gramian: Tensor) -> Tensor:
    """Return vectors `(n, n)` with these inner products."""
    values, directions = torch.linalg.eigh(gramian.double())
    vectors: Tensor = directions * values.clamp(min=0).sqrt()
    return vectors
