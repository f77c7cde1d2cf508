"""Does the rule do harm where no rank is bad? Consensus minus averaging, from the same draws, cell by cell."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.accuracy.arms import runs_of
from benchmarks.accuracy.declare import PAST, Experiment
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.tables import markdown
from benchmarks.accuracy.training import Record

ABOUT = f"""# Where no rank is bad: does the consensus rule do harm?

Final accuracy on clean test data in %: mean over seeds of averaging; what consensus (`GAFState()`) gains over it,
seed by seed from the same draws, with the standard error of that mean; the share of steps at which a rank was
kept, over all ranks, and of the rank kept least; and the gain of {PAST[1:]}, which judged in the same step. Every
declared cell without a bad rank with runs of both, and those where all ranks' labels are wrong alike; made from
[accuracy_runs.jsonl](accuracy_runs.jsonl).
"""


def write(experiments: Sequence[Experiment], store: Store, out: Path) -> None:
    """Write accuracy_harm.md into `out`; nothing where no cell has runs of both."""
    cells: dict[str, Experiment] = {}
    for e in experiments:
        if not e.bad:
            cells.setdefault(e.base.key, e)  # two groups may have the same cell
    lines = [line for e in cells.values() if (line := _line(e, store))]
    if lines:
        header = ["no rank is bad", "averaging", "gain of consensus", "kept", "least kept rank", "seeds"]
        header.append(f"gain as of {PAST[1:]}")
        (out / "accuracy_harm.md").write_text(f"{ABOUT}\n{markdown(header, lines)}\n")


def _line(experiment: Experiment, store: Store) -> list[str]:
    """Return a cell's line; nothing where there is none."""
    today, past = (_pairs(experiment, arm, store) for arm in ("consensus", f"consensus{PAST}"))
    if not today and not past:
        return []
    by_rank = [fmean(shares) for shares in zip(*(own["kept_by_rank"] for _, own in today), strict=True)]
    return [
        experiment.title,
        f"{fmean(plain['final'] for plain, _ in today or past):.1f}",
        _gain(today),
        f"{100 * fmean(by_rank):.1f} %" if by_rank else "",
        f"{100 * min(by_rank):.1f} %" if by_rank else "",
        str(len(today or past)),
        _gain(past),
    ]


def _pairs(experiment: Experiment, arm: str, store: Store) -> list[tuple[Record, Record]]:
    """Return the records of averaging and of an arm, of the seeds that both have."""
    if arm not in experiment.arms:
        return []
    return [
        (store[other], store[run])
        for run in runs_of(experiment, arm)
        if run in store and (other := replace(run, rule=experiment.base.rule)) in store
    ]


def _gain(pairs: Sequence[tuple[Record, Record]]) -> str:
    """Return the mean gain over averaging and its standard error; nothing where there is none."""
    gains = [own["final"] - plain["final"] for plain, own in pairs]
    error = f" ± {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    return f"{fmean(gains):+.2f}{error}" if gains else ""
