"""ByzFL's strongest rules and its attacks, as this benchmark calls them.

The package is optional, `pip install "gaf-ddp[evidence]"`.

Its rules are told the number f of bad ranks, which nobody knows. Mixing is a weighting, and weights are what the
hook and the tables are told, so they are read off: every vector carries a small mark of its own, and the result
shows how much of each there is. Clipping is no weighting: it sees the gradients themselves.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.accuracy.declare import Run
from gaf_ddp.rules.weighting import present

RULES = ("mixing", "clipping")
ATTACKS = ("SignFlipping", "InnerProductManipulation", "ALittleIsEnough", "Mimic", "Inf")
_MARK = 1e-4  # in units of the longest vector; adds the same to all distances between two of them


def at_hand() -> bool:
    """Return whether ByzFL is installed."""
    return find_spec("byzfl") is not None


def needed_by(run: Run) -> bool:
    """Return whether a run, or the run that it repeats, is of ByzFL's rules, or one of its attacks is on it."""
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


def clipping(radius: float) -> Callable[[Tensor], Tensor]:
    """Return centred clipping of gradients `(W, n)`, around its last result: one round, as its authors train."""
    from byzfl import CenteredClipping

    aggregate: Callable[[Tensor], Tensor] = CenteredClipping(tau=radius)
    return aggregate


def _vectors(gramian: Tensor) -> Tensor:
    """Return vectors `(n, n)` with these inner products."""
    values, directions = torch.linalg.eigh(gramian.double())
    vectors: Tensor = directions * values.clamp(min=0).sqrt()
    return vectors
