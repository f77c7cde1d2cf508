"""Train with plain averaging and with Gradient Agreement Filtering, and show the difference.

torchrun --standalone --nproc-per-node 4 -m launch.train
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from launch import checkpoint
from launch.checkpoint import Progress
from launch.cli import parse
from launch.data import Data, download, load
from launch.errors import SettingsError
from launch.ranks import Here, LaunchError, connected, from_first, require_same, take_place, together
from launch.records import Record
from launch.report import FullReport, Report
from launch.settings import Plan, Settings, as_flags, plan
from launch.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job of one rank; return 0 if it went well, 2 if the settings could not be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        parse(["--help"])
    if "RANK" not in os.environ:
        print(
            f"launch.train: error: start it with torchrun, as in: {' '.join(__doc__.split()[-6:])}",
            file=sys.stderr,
        )
        return 2
    with connected():
        try:
            _job(arguments)
        except LaunchError as error:
            _complain(error)
            return 2
    return 0


def _complain(error: LaunchError) -> None:
    """Show the problem once, and a traceback on the ranks where it was not the settings' fault."""
    if error.__cause__ is not None and not isinstance(error.__cause__, SettingsError):
        traceback.print_exception(error.__cause__)
    if os.environ["RANK"] == "0":
        print(f"launch.train: error: {error}", file=sys.stderr, flush=True)


def _job(arguments: Sequence[str]) -> None:
    settings = together(lambda: parse(arguments))
    # Before anything else: ranks with unlike settings would wait for each other, or train unlike replicas.
    require_same({"torch": torch.__version__, **as_flags(settings.as_plain())})
    here = take_place(settings.device)
    # It warns of skipped steps at every evaluation; the table does once.
    logging.getLogger("gaf_ddp").setLevel(logging.ERROR)
    data = _loaded(settings, here)
    out = settings.out or Path("runs", from_first(time.strftime("%Y%m%d-%H%M%S")))
    job = together(lambda: plan(settings, here.world, len(data.train), out))
    together(lambda: _check(job, here))
    progress = checkpoint.restore(job, here)
    report = together(lambda: FullReport(job, progress.records) if here.first else Report())
    if here.first:
        print(_introduction(job, here, progress), file=sys.stderr)
    report.finish(_train_all(job, data, here, progress, report))


def _loaded(settings: Settings, here: Here) -> Data:
    """Return the data, on every rank: fetched by rank 0, then on every node whose disk is another."""
    together(lambda: download(settings) if here.first else None)
    together(lambda: download(settings) if here.local_rank == 0 else None)
    return together(lambda: load(settings))


def _check(job: Plan, here: Here) -> None:
    """Check what only a rank that knows its device and its disk can tell."""
    if job.amp == "fp16" and here.device.type != "cuda":
        raise SettingsError(f"--amp fp16 needs CUDA, found {here.device.type}; use bf16 or none")
    if here.first and not job.resume and checkpoint.checkpoint_path(job.out).exists():
        raise SettingsError(f"--out must be a new folder, or be given with --resume; found a job in {job.out}")


def _introduction(job: Plan, here: Here, progress: Progress) -> str:
    wrong = ", ".join(map(str, job.corrupt_ranks)) or "none"
    place = f"{here.world} ranks on {here.device.type}"
    if job.device == "auto" and here.device.type == "cpu" and torch.cuda.is_available():
        place += f": more than the {torch.cuda.device_count()} GPUs here"
    start = f"going on with run {progress.run + 1} at step {progress.step}" if progress.records else "starting"
    runs = f"{len(job.runs)} runs of {job.steps} steps"
    return f"{job.data}, {job.model}, {place}, ranks with wrong labels: {wrong}; {start}, {runs}"


def _train_all(job: Plan, data: Data, here: Here, progress: Progress, report: Report) -> list[Record]:
    """Train every run that is not yet done; return the records of all."""
    records = list(progress.records)
    for number in range(progress.run, len(job.runs)):
        start = progress if number == progress.run else Progress(number, 0, None, [])
        if start.step < job.steps:
            _train(job, data, here, start, records, report)
    return records


def _train(job: Plan, data: Data, here: Here, start: Progress, records: list[Record], report: Report) -> None:
    """Train one run to its end, adding to `records`, which the checkpoints contain."""
    seed, method = job.runs[start.run]
    trainer = Trainer(job, data, here, seed, method)
    if start.trainer is not None:
        trainer.load_state_dict(start.trainer)
    report.begin(seed, method, start.step)
    for step in trainer.steps(start.step):
        report.advance()
        if step % job.eval_every == 0 or step == job.steps:
            records.append(trainer.evaluate(step))
            report.add(records[-1])
        if here.first and (step % job.checkpoint_every == 0 or step == job.steps):
            checkpoint.save(job, Progress(start.run, step, trainer.state_dict(), records))
    report.end()


if __name__ == "__main__":
    sys.exit(main())
