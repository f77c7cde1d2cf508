"""From records to numbers: the mean and spread of an arm over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from benchmarks.accuracy.arms import ARMS, Kind, real_runs_of, runs_of, title_of
from benchmarks.accuracy.declare import Experiment, Run
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.training import Record


@dataclass(frozen=True)
class Number:
    """A mean over seeds and its standard deviation (of the seeds, not of the mean)."""

    mean: float
    std: float
    count: int

    def __str__(self) -> str:
        """Mean ± std."""
        return f"{self.mean:.1f} ± {self.std:.1f}" if self.count > 1 else f"{self.mean:.1f}"


@dataclass(frozen=True)
class Row:
    """One arm of one experiment. final, best, stopped, few: test accuracy in %; kept, skipped: shares in %.

    real: final accuracy on real DDP ranks, None where that was not trained.
    """

    arm: str
    title: str
    kind: Kind
    final: Number
    best: Number
    stopped: Number
    few: Number
    kept: Number
    skipped: Number
    real: Number | None
    finals: tuple[float, ...]
    curve: tuple[float, ...]


def rows_of(experiment: Experiment, store: Store) -> list[Row]:
    """The rows of an experiment's table: the arms whose runs are all there, in order."""
    rows = []
    for arm in experiment.arms:
        runs = [run for run in runs_of(experiment, arm) if run in store]
        if runs and len(runs) == len(runs_of(experiment, arm)):
            rows.append(_row(experiment, arm, runs, store))
    return rows


def _row(experiment: Experiment, arm: str, runs: Sequence[Run], store: Store) -> Row:
    title = title_of(experiment, arm)
    if len({run.lr for run in runs}) > 1:
        best = max({run.lr for run in runs}, key=lambda lr: _final([r for r in runs if r.lr == lr], store))
        runs = [run for run in runs if run.lr == best]
        title += f" ({best:g})"
    records = [store[run] for run in runs]
    real = [store[run]["final"] for run in real_runs_of(experiment, arm) if run in store]
    return Row(
        arm,
        title,
        ARMS[arm].kind,
        **{name: number([r[name] for r in records]) for name in ("final", "best", "stopped", "few")},
        **{name: number([100 * r[name] for r in records]) for name in ("kept", "skipped")},
        real=number(real) if real else None,
        finals=tuple(record["final"] for record in records),
        curve=_mean_curve(records),
    )


def number(values: Sequence[float]) -> Number:
    """Mean and standard deviation."""
    return Number(mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))


def difference(row: Row, other: Row) -> tuple[float, float]:
    """Final accuracy of row minus other's, seed by seed: the mean and its standard error."""
    gaps = number([a - b for a, b in zip(row.finals, other.finals, strict=True)])
    return gaps.mean, gaps.std / gaps.count**0.5


def seconds_of(experiment: Experiment, store: Store, engine: str) -> float:
    """How long an experiment's runs took, one after the other."""
    runs = [run for arm in experiment.arms for run in (*runs_of(experiment, arm), *real_runs_of(experiment, arm))]
    unique = {run.key: run for run in runs if run.engine == engine and run in store}
    return float(sum(store[run]["seconds"] for run in unique.values()))


def engines_apart(experiments: Sequence[Experiment], store: Store) -> list[float]:
    """How far apart the final accuracies are, of every run that was made both ways."""
    pairs = {
        run.key: (run, replace(run, engine="one process"))
        for e in experiments
        for arm in e.arms
        for run in real_runs_of(e, arm)
    }
    made = [(real, alone) for real, alone in pairs.values() if real in store and alone in store]
    return [abs(store[real]["final"] - store[alone]["final"]) for real, alone in made]


def _final(runs: Sequence[Run], store: Store) -> float:
    return float(mean(store[run]["final"] for run in runs))


def _mean_curve(records: Sequence[Record]) -> tuple[float, ...]:
    return tuple(mean(values) for values in zip(*(record["curve"] for record in records), strict=True))
