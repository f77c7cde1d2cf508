"""From records to numbers: the mean and spread of an arm over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.accuracy.arms import ARMS, Kind, real_runs_of, runs_of, title_of
from benchmarks.accuracy.declare import Experiment, Run
from benchmarks.accuracy.store import Store


@dataclass(frozen=True)
class Number:
    """A mean over seeds and its standard deviation (of the seeds, not of the mean)."""

    mean: float
    std: float
    count: int

    def __str__(self) -> str:
        """Return mean ± std."""
        return f"{self.mean:.1f} ± {self.std:.1f}" if self.count > 1 else f"{self.mean:.1f}"


@dataclass(frozen=True)
class Row:
    """One arm of one experiment. final, best, stopped, few: test accuracy in %; kept, skipped: shares in %.

    real: final accuracy on real DDP ranks, None where that was not trained. learnt: share of wrong labels that the
    model has learnt, in %; distances: mean cosine distance of two ranks' gradients in the first and in the last tenth
    of the steps; None and () where records have none.
    """

    title: str
    kind: Kind
    final: Number
    best: Number
    stopped: Number
    few: Number
    kept: Number
    skipped: Number
    real: Number | None
    learnt: Number | None
    distances: tuple[Number, ...]


DISTANCES = ("distance_first", "distance_last")
Table = dict[str, Row]  # by the arm's name
Tables = list[tuple[Experiment, Table]]


def tables_of(experiments: Sequence[Experiment], store: Store) -> Tables:
    """Return the experiments that have finished runs, each with the arms whose runs are all there, in order."""
    found = []
    for e in experiments:
        runs = {arm: runs_of(e, arm) for arm in e.arms}
        finished = {arm: _row(e, arm, runs[arm], store) for arm in e.arms if _all_there(runs[arm], store)}
        if finished:
            found.append((e, finished))
    return found


def _all_there(runs: Sequence[Run], store: Store) -> bool:
    return bool(runs) and all(run in store for run in runs)


def _choice(run: Run) -> tuple[float, float | None]:
    """Return what an arm with several runs of a seed chooses by test accuracy: lr, or the parameter of its rule.

    A random control chooses among the rules that it repeats.
    """
    return run.lr, (run.rule.like or run.rule).parameter


def _row(experiment: Experiment, arm: str, runs: Sequence[Run], store: Store) -> Row:
    title = title_of(experiment, arm)
    if len({_choice(run) for run in runs}) > 1:
        ways = {_choice(run): [store[r]["final"] for r in runs if _choice(r) == _choice(run)] for run in runs}
        best = max(ways, key=lambda way: mean(ways[way]))
        runs = [run for run in runs if _choice(run) == best]
        title += f" ({best[len({lr for lr, _ in ways}) == 1]:g})"
    records = [store[run] for run in runs]
    real = [store[run]["final"] for run in real_runs_of(experiment, arm) if run in store]
    return Row(
        title,
        ARMS[arm].kind,
        **{name: _number([r[name] for r in records]) for name in ("final", "best", "stopped", "few")},
        **{name: _number([100 * r[name] for r in records]) for name in ("kept", "skipped")},
        real=_number(real) if real else None,
        learnt=_number([r["wrong_learnt"] for r in records]) if all("wrong_learnt" in r for r in records) else None,
        distances=tuple(_number([r[name] for r in records]) for name in DISTANCES if all(name in r for r in records)),
    )


def _number(values: Sequence[float]) -> Number:
    return Number(mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))
