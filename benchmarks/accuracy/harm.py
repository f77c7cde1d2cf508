"""Does the rule do harm where no rank is bad? Consensus minus averaging, from the same draws, cell by cell."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.accuracy.arms import runs_of
from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.tables import markdown

ABOUT = """# Where no rank is bad: does the consensus rule do harm?

Final accuracy on clean test data in %: mean over seeds of averaging; what consensus (`GAFState()`) gains over it,
seed by seed from the same draws, with the standard error of that mean; the share of steps at which a rank was
kept, over all ranks, and of the rank kept least. Every declared cell without a bad rank with runs of both, and
those where all ranks' labels are wrong alike; made from [accuracy_runs.jsonl](accuracy_runs.jsonl).
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
        (out / "accuracy_harm.md").write_text(f"{ABOUT}\n{markdown(header, lines)}\n")


def _line(experiment: Experiment, store: Store) -> list[str]:
    """Return a cell's line, of the seeds that both arms have; nothing where there is none."""
    if "consensus" not in experiment.arms:
        return []
    pairs = [
        (store[other], store[run])
        for run in runs_of(experiment, "consensus")
        if run in store and (other := replace(run, rule=experiment.base.rule)) in store
    ]
    if not pairs:
        return []
    gains = [own["final"] - plain["final"] for plain, own in pairs]
    error = f" ± {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    by_rank = [fmean(shares) for shares in zip(*(own["kept_by_rank"] for _, own in pairs), strict=True)]
    return [
        experiment.title,
        f"{fmean(plain['final'] for plain, _ in pairs):.1f}",
        f"{fmean(gains):+.2f}{error}",
        f"{100 * fmean(by_rank):.1f} %",
        f"{100 * min(by_rank):.1f} %",
        str(len(pairs)),
    ]
