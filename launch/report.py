"""What a job leaves behind: metrics while it runs, a table and a picture at the end. Rank 0 only."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from statistics import fmean

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from launch import checkpoint
from launch.checkpoint import Progress
from launch.folder import write_whole
from launch.methods import NAMES
from launch.records import Record, Result, results, spread
from launch.settings import Plan

MOST_COLUMNS = 8  # ranks, in the table


class Report:
    """What ranks other than the first report: nothing."""

    def begin(self, seed: int, method: str, step: int) -> None:
        """Start a run at `step`."""

    def advance(self) -> None:
        """Count one step."""

    def add(self, record: Record) -> None:
        """Show an evaluation and write it down."""

    def save(self, progress: Progress) -> None:
        """Write the checkpoint."""

    def end(self) -> None:
        """End the run."""

    def finish(self, records: Sequence[Record]) -> None:
        """End the job, given the records of all runs."""


class FullReport(Report):
    """The progress on the screen and all files of a job."""

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        threading.excepthook = _leave_to_the_writer
        self._plan = plan
        self._begun = time.perf_counter()
        write_whole(plan.out / "settings.json", (json.dumps(plan.as_plain(), indent=2) + "\n").encode())
        # Lines written after the checkpoint that this job goes on from will be written again.
        self._metrics = plan.out / "metrics.jsonl"
        write_whole(self._metrics, "".join(record.as_json() + "\n" for record in records).encode())

    def begin(self, seed: int, method: str, step: int) -> None:
        """Start the progress bar and the TensorBoard events of a run."""
        folder = self._plan.out / "tensorboard" / f"{method}-seed{seed}"
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        name = f"{NAMES[method]}, seed {seed}"
        self._bar = tqdm(total=self._plan.steps, initial=step, desc=name, unit="step", disable=None)

    def advance(self) -> None:
        """Move the bar."""
        self._bar.update()

    def add(self, record: Record) -> None:
        """Write an evaluation down; show it beside the bar, or as a line where there is no terminal."""
        with self._metrics.open("a") as file:
            file.write(record.as_json() + "\n")
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record.step)
        if self._bar.disable:
            print(_line(record, self._plan), file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(f"accuracy {record.accuracy:.1f} %")

    def save(self, progress: Progress) -> None:
        """Write the checkpoint and keep the one before."""
        checkpoint.save(self._plan, progress)

    def end(self) -> None:
        """Close what `begin` opened."""
        self._writer.close()
        self._bar.close()

    def finish(self, records: Sequence[Record]) -> None:
        """Print the table and draw the picture."""
        from launch.picture import draw  # matplotlib takes a second to import

        table = tabulate(results(records), self._plan)
        write_whole(self._plan.out / "table.txt", f"{table}\n".encode())
        draw(records, self._plan, self._plan.out / "agreement.png")
        print(f"\n{table}\ndone in {time.perf_counter() - self._begun:.0f} s; results are in {self._plan.out}")


def _leave_to_the_writer(caught: threading.ExceptHookArgs) -> None:
    """Show no traceback of TensorBoard's thread: what ends it is raised again where events are written."""
    if not type(caught.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(caught)


def _scalars(record: Record) -> dict[str, float]:
    scalars = {
        "accuracy": record.accuracy,
        "loss": record.loss,
        "lr": record.lr,
        "gaf/skipped": record.skipped,
        **{f"gaf/kept_rank_{rank:02d}": share for rank, share in enumerate(record.kept)},
    }
    return scalars if record.cosine is None else {**scalars, "gaf/mean_cosine": record.cosine}


def _line(record: Record, plan: Plan) -> str:
    name = NAMES[record.method]
    return f"{name}, seed {record.seed}: step {record.step}/{plan.steps}, accuracy {record.accuracy:.1f} %"


def tabulate(outcome: dict[str, list[Result]], plan: Plan) -> str:
    """Return one line per method: accuracies in percent, steps skipped, and how often each rank was kept.

    Means over the seeds, with standard deviations where there are several.
    """
    groups = _groups(min(len(run.kept) for runs in outcome.values() for run in runs), plan)
    head = ["method", "final accuracy", "best", "skipped", *groups]
    rows = [head, *(_row(NAMES[method], runs, groups) for method, runs in outcome.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = ["final: mean of the last 3 evaluations, in percent of clean test data"]
    notes += [f"mean ± standard deviation over {plan.seeds} seeds"] if plan.seeds > 1 else []
    notes += ["!: trains on wrong labels"] if plan.corrupt_ranks else []
    lines.append("; ".join(notes))
    idle = [NAMES[method] for method, runs in outcome.items() if fmean(run.skipped for run in runs) > 0.5]
    if idle:
        lines.append(f"{' and '.join(idle)} skipped most steps: a larger --tau or --batch-size may help")
    return "\n".join(lines)


def _groups(world: int, plan: Plan) -> dict[str, list[int]]:
    """Return the columns about kept ranks: one per rank, or with many ranks one for all of a kind."""
    marks = ["!" * (rank in plan.corrupt_ranks) for rank in range(world)]
    if world > MOST_COLUMNS:
        names = [f"kept: {'wrong!' if mark else 'ranks'}" for mark in marks]
    else:
        names = [f"{'' if rank else 'kept: '}rank {rank}{mark}" for rank, mark in enumerate(marks)]
    groups: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        groups.setdefault(name, []).append(rank)
    return groups


def _row(name: str, runs: Sequence[Result], groups: dict[str, list[int]]) -> list[str]:
    final, best = ([getattr(run, which) for run in runs] for which in ("final", "best"))
    skipped = fmean(run.skipped for run in runs)
    kept = [fmean(run.kept[rank] for run in runs for rank in ranks) for ranks in groups.values()]
    return [name, _accuracy(final), _accuracy(best), f"{skipped:.0%}", *(f"{share:.0%}" for share in kept)]


def _accuracy(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"
