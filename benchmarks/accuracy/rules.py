"""From a Gramian to weights, by name: the package's filters, TorchJD's rules, and the random controls.

A rule of None is plain averaging with no hook at all. The controls repeat another run's acceptance: how many
ranks it kept at each step, as a list of counts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.accuracy.candidates import MemoryAgreement, QuantileAgreement, SoftAgreement
from benchmarks.accuracy.declare import Rule, Run
from gaf_ddp import Mean, NeighborhoodAgreement, SequentialAgreement, Weighting
from gaf_ddp.weighting import present

Weigh = Callable[[Tensor], Tensor]

MOMENTA = "neighborhood of momenta"  # the rule that is shown the Gramian of the momenta
VOTE_MOMENTUM = 0.9


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


class ShuffledWeights(Weighting):
    """The weights of another rule on the same Gramian, dealt to the voters at random."""

    def __init__(self, weigh: Weigh, seed: int) -> None:
        self._weigh = weigh
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)` of the next step."""
        order = torch.randperm(len(gramian), generator=self._random).to(gramian.device)
        voters = present(gramian).nonzero().squeeze(1)
        weights = self._weigh(gramian)
        dealt = torch.zeros_like(weights)
        dealt[order[torch.isin(order, voters)]] = weights[voters]
        return dealt


def _shuffled(rule: Rule, run: Run, counts: Sequence[int]) -> Weigh:
    assert rule.of is not None
    weigh = RULES[rule.of.name](rule.of, run, counts)
    assert weigh is not None
    return ShuffledWeights(weigh, run.seed)


def _krum(rule: Rule, run: Run, counts: Sequence[int]) -> Weigh:
    """Krum, told how many ranks are bad (parameter); it averages the voters where too few are left for it."""
    from torchjd.aggregation import KrumWeighting

    def weigh(gramian: Tensor) -> Tensor:
        bad = min(int(rule.parameter or 0), len(gramian) - 3)
        chosen: Weigh = KrumWeighting(n_byzantine=bad, n_selected=1) if bad >= 0 else Mean()
        weights: Tensor = chosen(gramian)
        return weights

    return weigh


def _upgrad(rule: Rule, run: Run, counts: Sequence[int]) -> Weigh:
    from torchjd.aggregation import UPGradWeighting

    weigh = UPGradWeighting()
    return lambda gramian: weigh(gramian.double()).to(gramian)


def _tau(rule: Rule) -> float:
    return 1.0 if rule.parameter is None else rule.parameter


RULES: dict[str, Callable[[Rule, Run, Sequence[int]], Weigh | None]] = {
    "averaging": lambda rule, run, counts: None,
    "guard only": lambda rule, run, counts: Mean(),
    "neighborhood": lambda rule, run, counts: NeighborhoodAgreement(_tau(rule)),
    MOMENTA: lambda rule, run, counts: NeighborhoodAgreement(_tau(rule)),
    "sequential": lambda rule, run, counts: SequentialAgreement(_tau(rule)),
    "random members": lambda rule, run, counts: RandomMembers(counts, run.seed),
    "random skips": lambda rule, run, counts: RandomSkips(counts, run.seed),
    "krum": _krum,
    "shuffled": _shuffled,
    "upgrad": _upgrad,
    "quantile": lambda rule, run, counts: QuantileAgreement(_tau(rule)),
    "memory": lambda rule, run, counts: MemoryAgreement(_tau(rule)),
    "soft": lambda rule, run, counts: SoftAgreement(_tau(rule)),
}


def vote_momentum(rule: Rule) -> float:
    """By what the rule wants the ranks judged: `GAFState`'s setting of that name."""
    return VOTE_MOMENTUM if MOMENTA in (rule.name, rule.of and rule.of.name) else 0.0


def build_rule(run: Run, counts: Sequence[int] = ()) -> Weigh | None:
    """A fresh rule for a run; counts: what the run that it repeats kept at each step."""
    if run.rule.like is not None and len(counts) < run.steps:
        raise ValueError(f"counts must hold {run.steps} steps for {run.rule}, found {len(counts)}")
    return RULES[run.rule.name](run.rule, run, counts)
