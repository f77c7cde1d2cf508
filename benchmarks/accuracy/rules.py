"""How the ranks' gradients become one, by name: the package's filters, others' rules, and the random controls.

A rule is what `GAFState` is told, but for rules of others that see the gradients themselves (`peers.py`). The
controls repeat another run's acceptance: how many ranks it kept at each step, as a list of counts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import peers
from benchmarks.accuracy.declare import Run
from gaf_ddp import Mean, NeighborhoodAgreement, SequentialAgreement, Weighting
from gaf_ddp.rules.weighting import present

Settings = dict[str, Any]  # of GAFState, beside its scope

CONSENSUS = "consensus"  # the default rule; its parameter is the sketch's size


class RandomMembers(Weighting):
    """As many ranks as another run kept at this step, chosen at random among the voters."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._counts = iter(counts)
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)` of the next step."""
        order = torch.randperm(len(gramian), generator=self._random)
        voters = present(gramian).cpu()
        chosen = order[voters[order]][: next(self._counts)]
        weights = torch.zeros(len(gramian))
        weights[chosen] = 1 / max(len(chosen), 1)
        return weights.to(gramian)


class RandomSkips(Weighting):
    """All voters, or nobody at steps chosen at random, as many as those at which another run kept nobody."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()
        self._taken = iter([counts[i] > 0 for i in order])
        self._mean = Mean()

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)` of the next step."""
        weights = self._mean(gramian)
        return weights if next(self._taken) else torch.zeros_like(weights)


def _krum(bad: float) -> Callable[[Tensor], Tensor]:
    """Return Krum, told how many ranks are bad; it averages the voters where too few are left for it."""
    from torchjd.aggregation import KrumWeighting

    def weigh(gramian: Tensor) -> Tensor:
        most = min(int(bad), len(gramian) - 3)
        chosen = KrumWeighting(n_byzantine=most, n_selected=1) if most >= 0 else Mean()
        weights: Tensor = chosen(gramian)
        return weights

    return weigh


def _upgrad() -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import UPGradWeighting

    weigh = UPGradWeighting()
    return lambda gramian: weigh(gramian.double()).to(gramian)


# From the rule's parameter, the run's seed, and the counts of the run that it repeats.
RULES: dict[str, Callable[[Any, int, Sequence[int]], Settings]] = {
    "guard only": lambda _, seed, counts: {"weighting": Mean()},
    "neighborhood": lambda tau, seed, counts: {"weighting": NeighborhoodAgreement(tau)},
    "sequential": lambda tau, seed, counts: {"weighting": SequentialAgreement(tau)},
    "random members": lambda _, seed, counts: {"weighting": RandomMembers(counts, seed)},
    "random skips": lambda _, seed, counts: {"weighting": RandomSkips(counts, seed)},
    "krum": lambda bad, seed, counts: {"weighting": _krum(bad)},
    "mixing": lambda bad, seed, counts: {"weighting": peers.mixing(int(bad))},
    "upgrad": lambda _, seed, counts: {"weighting": _upgrad()},
    # As GAFState() is by itself, up to 16 ranks.
    CONSENSUS: lambda size, seed, counts: {"sketch_size": int(size), "judge_every": 1},
}


def settings_of(run: Run, counts: Sequence[int] = ()) -> Settings | None:
    """Return what a run's `GAFState` is told, new for each run; None where there is none.

    counts: how many ranks the run that it repeats kept at each step.
    """
    if run.rule.like is not None and len(counts) < run.steps:
        raise ValueError(f"counts must hold {run.steps} steps for {run.rule}, found {len(counts)}")
    if run.rule.name == "averaging" or run.rule.name in peers.AVERAGES:
        return None
    return RULES[run.rule.name](run.rule.parameter, run.seed, counts)
