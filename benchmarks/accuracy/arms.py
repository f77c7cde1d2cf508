"""The arms of an experiment: what is trained in its setting, the filters and the controls beside them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.accuracy.declare import Experiment, Labels, Rule, Run
from benchmarks.accuracy.rules import MOMENTA, VOTE_MOMENTUM

Kind = Literal["averaging", "filter", "control", "other rule", "oracle"]


@dataclass(frozen=True)
class Arm:
    """title: for people, {tau} is filled in. runs: seed 0's; more than one where the best is to be chosen."""

    title: str
    kind: Kind
    runs: Callable[[Experiment], list[Run]]


def runs_of(experiment: Experiment, arm: str) -> list[Run]:
    """All runs of an arm, every seed, in one process."""
    seeds = range(experiment.seeds)
    return [replace(run, seed=seed) for run in ARMS[arm].runs(experiment) for seed in seeds]


def real_runs_of(experiment: Experiment, arm: str) -> list[Run]:
    """The runs of an arm that are repeated on real ranks."""
    if arm not in experiment.real_arms:
        return []
    repeated = [run for run in runs_of(experiment, arm) if run.seed < experiment.real_seeds]
    return [replace(run, engine="ddp") for run in repeated]


def title_of(experiment: Experiment, arm: str) -> str:
    """The arm's name for people."""
    return ARMS[arm].title.format(tau=f"{experiment.tau:g}")


def _ruled(name: str, parameter: Callable[[Experiment], float | None]) -> Callable[[Experiment], list[Run]]:
    return lambda e: [replace(e.base, rule=Rule(name, parameter(e)))]


def _repeating(control: str, arm: str) -> Callable[[Experiment], list[Run]]:
    """A random control with the acceptance of another arm."""

    def runs(e: Experiment) -> list[Run]:
        return [replace(run, rule=Rule(control, like=run.rule)) for run in ARMS[arm].runs(e)]

    return runs


def _shuffling(arm: str) -> Callable[[Experiment], list[Run]]:
    """The weights of another arm's rule, dealt to random ranks."""
    return lambda e: [replace(run, rule=Rule("shuffled", of=run.rule)) for run in ARMS[arm].runs(e)]


def _best_lr(e: Experiment) -> list[Run]:
    return [replace(e.base, lr=lr) for lr in e.lrs]


def _tuned(e: Experiment) -> list[Run]:
    return [replace(run, rule=Rule("neighborhood", e.tau)) for run in _best_lr(e)]


def _bad(e: Experiment) -> float:
    """How many ranks are bad: what Krum is told. 1 where there are none or everyone's labels are noisy."""
    return float(max(len(e.bad), 1))


def _krum(e: Experiment) -> list[Run]:
    """Krum needs three ranks more than are bad."""
    enough = len(e.base.ranks) >= _bad(e) + 3
    return [replace(e.base, rule=Rule("krum", _bad(e)))] if enough else []


def _oracle(e: Experiment) -> list[Run]:
    if e.bad:
        good = tuple(rank for rank in e.base.ranks if rank not in e.bad)
        return [replace(e.base, ranks=good, fault=None)]
    return [replace(e.base, labels=Labels())]


def _layers(e: Experiment) -> list[Run]:
    return [replace(e.base, scope="bucket", rule=Rule("neighborhood", e.tau))]


def _candidate(name: str, parameter: float, title: str) -> dict[str, Arm]:
    """A candidate and the two controls with its acceptance."""
    key = f"{name} {parameter:g}"
    shuffled = Arm("… its weights, to random ranks", "control", _shuffling(key))
    return {
        key: Arm(title, "filter", _ruled(name, lambda e: parameter)),
        **_controls(key),
        f"{key}: shuffled": shuffled,
    }


def _momenta(tau: float) -> dict[str, Arm]:
    """Ranks judged by momenta; their cosines are higher, so tau is its own."""
    key = f"momenta {tau:g}"
    title = f"judged by momenta {VOTE_MOMENTUM:g}, tau {tau:g}"
    return {key: Arm(title, "filter", _ruled(MOMENTA, lambda e: tau)), **_controls(key)}


def _controls(arm: str) -> dict[str, Arm]:
    return {
        f"{arm}: random members": Arm("… random members", "control", _repeating("random members", arm)),
        f"{arm}: random skips": Arm("… random skips", "control", _repeating("random skips", arm)),
    }


ARMS: dict[str, Arm] = {
    "averaging": Arm("averaging", "averaging", lambda e: [e.base]),
    "best lr": Arm("averaging, best lr", "averaging", _best_lr),
    "decay": Arm("averaging, weight decay 1e-2", "averaging", lambda e: [replace(e.base, weight_decay=1e-2)]),
    "guard only": Arm("averaging behind the norm guard", "control", _ruled("guard only", lambda e: None)),
    "random members": Arm(
        "random members, as many as the filter", "control", _repeating("random members", "neighborhood")
    ),
    "random skips": Arm(
        "random skips, as often as the filter", "control", _repeating("random skips", "neighborhood")
    ),
    "neighborhood": Arm("NeighborhoodAgreement, tau {tau}", "filter", _ruled("neighborhood", lambda e: e.tau)),
    "default": Arm("NeighborhoodAgreement, tau 1 (default)", "filter", _ruled("neighborhood", lambda e: 1.0)),
    "tuned": Arm("NeighborhoodAgreement, tau {tau}, best lr", "filter", _tuned),
    "sequential": Arm("SequentialAgreement (paper), tau {tau}", "filter", _ruled("sequential", lambda e: e.tau)),
    "upgrad": Arm("UPGrad (TorchJD)", "other rule", _ruled("upgrad", lambda e: None)),
    "krum": Arm("Krum (TorchJD)", "other rule", _krum),
    "oracle": Arm("oracle: no bad ranks or labels", "oracle", _oracle),
    **_momenta(0.7),
    **_momenta(0.5),
    "layers": Arm("per layer, tau {tau}", "filter", _layers),
    **_candidate("quantile", 0.3, "tau = 0.3 quantile of recent distances"),
    **_candidate("quantile", 0.6, "tau = 0.6 quantile of recent distances"),
    **_candidate("memory", 0.9, "near the mean of past updates, tau 0.9"),
    **_candidate("memory", 1.0, "near the mean of past updates, tau 1"),
    **_candidate("soft", 1.0, "soft weights by cosine"),
    **_candidate("soft", 3.0, "soft weights by cosine cubed"),
    **_controls("layers"),
}

ALL = (
    "averaging", "best lr", "decay", "random members", "random skips",
    "default", "neighborhood", "momenta 0.7", "sequential", "upgrad", "krum", "oracle",
)  # fmt: skip
"""What every experiment trains."""

WITH_TUNED = (*ALL[: ALL.index("sequential")], "tuned", *ALL[ALL.index("sequential") :])
