"""The arms of an experiment: what is trained in its setting, the filters and the controls beside them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.accuracy.declare import PAST, Experiment, Labels, Reference, Rule, Run
from benchmarks.accuracy.peer_arms import clipping, krum, mixing, most, told
from benchmarks.accuracy.rules import CONSENSUS

Kind = Literal["averaging", "filter", "control", "other rule", "oracle"]


@dataclass(frozen=True)
class Arm:
    """title: for people, {tau} is filled in. runs: seed 0's; more than one where the best is to be chosen."""

    title: str
    kind: Kind
    runs: Callable[[Experiment], list[Run]]


def runs_of(experiment: Experiment, arm: str) -> list[Run]:
    """Return all runs of an arm, every seed, in one process."""
    seeds = range(experiment.first_seed, experiment.first_seed + experiment.seeds)
    return [replace(run, seed=seed) for run in ARMS[arm].runs(experiment) for seed in seeds]


def real_runs_of(experiment: Experiment, arm: str) -> list[Run]:
    """Return the runs of an arm that are repeated on real ranks."""
    if arm not in experiment.real_arms:
        return []
    repeated = [run for run in runs_of(experiment, arm) if run.seed < experiment.first_seed + experiment.real_seeds]
    return [replace(run, engine="ddp") for run in repeated]


def all_runs(experiments: Iterable[Experiment]) -> list[Run]:
    """Return every run the experiments need, once, real ranks last; what others repeat comes before them."""
    pairs = [(e, arm) for e in experiments for arm in e.arms]
    runs = [run for e, arm in pairs for run in (*runs_of(e, arm), *real_runs_of(e, arm))]
    needed = [replace(run, rule=run.rule.like) for run in runs if run.rule.like is not None]
    unique = {run.key: run for run in (*needed, *runs)}
    return sorted(unique.values(), key=lambda run: (run.engine == "ddp", run.rule.like is not None))


def title_of(experiment: Experiment, arm: str) -> str:
    """Return the arm's name for people."""
    return ARMS[arm].title.format(tau=f"{experiment.tau:g}")


def _ruled(name: str, parameter: Callable[[Experiment], float | None]) -> Callable[[Experiment], list[Run]]:
    return lambda e: [replace(e.base, rule=Rule(name, parameter(e)))]


def _repeating(control: str, arm: str) -> Callable[[Experiment], list[Run]]:
    """Return a random control's runs, with the acceptance of another arm."""
    return lambda e: [replace(run, rule=Rule(control, like=run.rule)) for run in ARMS[arm].runs(e)]


def _repeating_all(control: str, runs: Callable[[Experiment], list[Run]]) -> Callable[[Experiment], list[Run]]:
    return lambda e: [replace(run, rule=Rule(control, like=run.rule)) for run in runs(e)]


def _sequential(e: Experiment) -> list[Run]:
    return [replace(e.base, rule=Rule("sequential", tau)) for tau in e.taus]


def _best_lr(e: Experiment) -> list[Run]:
    return [replace(e.base, lr=lr) for lr in e.lrs]


def _tuned(e: Experiment) -> list[Run]:
    return [replace(run, rule=Rule("neighborhood", e.tau)) for run in _best_lr(e)]


def _tuned_consensus(e: Experiment) -> list[Run]:
    return [replace(run, rule=Rule(CONSENSUS, 4096.0)) for run in _best_lr(e)]


def _oracle(e: Experiment) -> list[Run]:
    if e.bad:
        good = tuple(rank for rank in e.base.ranks if rank not in e.bad)
        return [replace(e.base, ranks=good, fault=None)]
    return [replace(e.base, labels=Labels())]


def with_controls(key: str, arm: Arm) -> dict[str, Arm]:
    """Return an arm called key, and the two random controls with its acceptance."""
    members = Arm("… random members", "control", _repeating("random members", key))
    skips = Arm("… random skips", "control", _repeating("random skips", key))
    return {key: arm, f"{key}: random members": members, f"{key}: random skips": skips}


_TODAY: dict[str, Arm] = {
    "averaging": Arm("averaging", "averaging", lambda e: [e.base]),
    "best lr": Arm("averaging, best lr", "averaging", _best_lr),
    "decay": Arm("averaging, weight decay 1e-2", "averaging", lambda e: [replace(e.base, weight_decay=1e-2)]),
    "guard only": Arm("averaging behind the norm guard", "control", _ruled("guard only", lambda e: None)),
    "random members": Arm(
        "random members, as many as the filter", "control", _repeating("random members", "neighborhood")
    ),
    "random skips": Arm("random skips, as often as the filter", "control", _repeating("random skips", "neighborhood")),
    "neighborhood": Arm("NeighborhoodAgreement, tau {tau}", "filter", _ruled("neighborhood", lambda e: e.tau)),
    "default": Arm("NeighborhoodAgreement, tau 1 (default)", "filter", _ruled("neighborhood", lambda e: 1.0)),
    "tuned": Arm("NeighborhoodAgreement, tau {tau}, best lr", "filter", _tuned),
    "sequential": Arm("SequentialAgreement (paper), tau {tau}", "filter", _ruled("sequential", lambda e: e.tau)),
    "sequential, best tau": Arm("SequentialAgreement (paper), best tau", "filter", _sequential),
    "sequential: random skips": Arm(
        "… random skips, as many at the best tau", "control", _repeating_all("random skips", _sequential)
    ),
    "upgrad": Arm("UPGrad (TorchJD)", "other rule", _ruled("upgrad", lambda e: None)),
    "krum": Arm("Krum (TorchJD)", "other rule", krum),
    "mixing": Arm("mixing + multi-Krum (ByzFL), f right", "other rule", mixing(lambda e: len(e.bad))),
    "mixing less": Arm("mixing + multi-Krum, f one too small", "other rule", mixing(lambda e: len(e.bad) - 1)),
    "mixing more": Arm("mixing + multi-Krum, f one too large", "other rule", mixing(lambda e: len(e.bad) + 1)),
    "mixing most": Arm("mixing + multi-Krum, f as large as allowed", "other rule", mixing(most)),
    "clipping": Arm("centred clipping (ByzFL), best radius", "other rule", clipping),
    "smea": Arm("SMEA (ByzPy), f right", "other rule", told("smea")),
    "caf": Arm("CAF (ByzPy), f right", "other rule", told("caf")),
    "oracle": Arm("oracle: no bad ranks or labels", "oracle", _oracle),
    **with_controls("consensus", Arm("consensus (`GAFState()`)", "filter", _ruled(CONSENSUS, lambda e: 4096.0))),
    "consensus 1024": Arm("consensus, sketches of 1024", "filter", _ruled(CONSENSUS, lambda e: 1024.0)),
    "tuned consensus": Arm("consensus, best lr", "filter", _tuned_consensus),
}


def _referring(reference: Reference) -> Callable[[Experiment], list[Run]]:
    return lambda e: [replace(e.base, rule=Rule(CONSENSUS, 4096.0, reference=reference))]


_HELD_OUT = {
    **with_controls("reference", Arm("consensus with held-out data", "filter", _referring(Reference()))),
    "reference, every 50": Arm("… read every 50 steps", "filter", _referring(Reference(every=50))),
    "reference of 400": Arm("consensus with 400 held-out examples", "filter", _referring(Reference(examples=400))),
    "reference, 64": Arm("… of 64 examples", "filter", _referring(Reference(examples=64))),
    "reference, 20 % wrong": Arm("… with 20 % wrong labels", "filter", _referring(Reference(wrong=0.2))),
    "reference, lacks": Arm("… without classes 8 and 9", "filter", _referring(Reference(lacks=(8, 9)))),
    "reference, same": Arm("… the same on all ranks", "filter", _referring(Reference(same=True))),
    "reference, training": Arm(
        "… each rank's training data in its place", "filter", _referring(Reference(training=True))
    ),
}
CARELESS = tuple(name for name in _HELD_OUT if "," in name)


def _landed(arm: Arm) -> Arm:
    """Return an arm's runs by the code of PAST."""

    def past(rule: Rule) -> Rule:
        return replace(rule, like=past(rule.like)) if rule.like else replace(rule, name=rule.name + PAST)

    title = f"{arm.title}, as of {PAST[1:]}"
    return Arm(title, arm.kind, lambda e: [replace(run, rule=past(run.rule)) for run in arm.runs(e)])


ARMS: dict[str, Arm] = {}
for _name, _arm in _TODAY.items():
    ARMS[_name] = _arm
    if "consensus" in _name:
        ARMS[_name + PAST] = _landed(_arm)
ARMS |= _HELD_OUT


def beside_landed(arms: Iterable[str]) -> tuple[str, ...]:
    """Return the arms, each with what PAST made of it."""
    return tuple(each for arm in arms for each in (arm, arm + PAST) if each in ARMS)


CONSENSUS_ARMS = ("consensus", "consensus: random members", "consensus 1024")

ALL = (
    "averaging", "best lr", "decay", "random members", "random skips",
    "default", "neighborhood", *CONSENSUS_ARMS, "sequential", "upgrad", "krum", "oracle",
)  # fmt: skip
"""What every experiment trains."""

PEERS = ("mixing", "mixing less", "mixing more", "mixing most", "clipping")
"""ByzFL's rules, in chosen experiments."""

WITH_TUNED = (*ALL[: ALL.index("sequential")], "tuned", *ALL[ALL.index("sequential") :])
