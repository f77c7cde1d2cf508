"""Train with plain averaging and with Gradient Agreement Filtering, and show the difference.

torchrun --standalone --nproc-per-node 4 -m launch.train
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from launch import checkpoint
from launch.checkpoint import Progress
from launch.cli import parse
from launch.data import Data, download, load
from launch.errors import LaunchError, SettingsError
from launch.folder import claim, writing
from launch.messages import from_first, require_same
from launch.ranks import Here, connected, take_place, together
from launch.records import Record
from launch.report import FullReport, Report
from launch.settings import Plan, Settings, as_flags, plan
from launch.starts import tell_torchrun
from launch.stop import EXIT_CODE, Stop, Stopped
from launch.trainer import Trainer

T = TypeVar("T")

_EXAMPLE = " ".join(__doc__.split()[-6:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job of one rank; return 0 if it went well, 2 if it could not go on, 143 if SIGTERM stopped it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        parse(["--help"])
    if "RANK" not in os.environ:
        print(f"launch.train: error: start it with torchrun, as in: {_EXAMPLE}", file=sys.stderr)
        return 2
    with connected():
        try:
            _job(arguments)
        except LaunchError as error:
            # A traceback on the ranks where it was not the settings' fault.
            if error.__cause__ is not None and not isinstance(error.__cause__, SettingsError):
                traceback.print_exception(error.__cause__)
            _say(f"error: {error}")
            return 2
        except Stopped as stopped:
            _say(f"stopped by SIGTERM {stopped}")
            return EXIT_CODE
    return 0


def _say(text: str) -> None:
    tell_torchrun(f"launch.train: {text}")
    if os.environ["RANK"] == "0":
        print(f"launch.train: {text}", file=sys.stderr, flush=True)


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
    with together(lambda: claim(out) if here.first else nullcontext()):
        progress = checkpoint.restore(job, here)
        report = _written(job, lambda: FullReport(job, progress.records) if here.first else Report())
        if here.first:
            print(_introduction(job, here, progress), file=sys.stderr)
        records = _train_all(job, data, here, progress, report)
        _written(job, lambda: report.finish(records))


def _written(job: Plan, action: Callable[[], T]) -> T:
    """Return what an action that writes files returns; where it cannot, every rank ends with one line."""

    def attempt() -> T:
        with writing(job.out):
            return action()

    return together(attempt)


def _loaded(settings: Settings, here: Here) -> Data:
    """Return the data, on every rank: fetched by rank 0, then on every node whose disk is another."""
    together(lambda: download(settings) if here.first else None)
    together(lambda: download(settings) if here.local_rank == 0 else None)
    return together(lambda: load(settings))


def _check(job: Plan, here: Here) -> None:
    """Check what only a rank that knows its device can tell."""
    if job.amp == "fp16" and here.device.type != "cuda":
        raise SettingsError(f"--amp fp16 needs CUDA, found {here.device.type}; use bf16 or none")


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
    with Stop() as stop:
        for number in range(progress.run, len(job.runs)):
            start = progress if number == progress.run else Progress(number, 0, None, [])
            if start.step < job.steps:
                _train(job, data, here, start, records, report, stop)
    return records


def _train(
    job: Plan, data: Data, here: Here, start: Progress, records: list[Record], report: Report, stop: Stop
) -> None:
    """Train one run to its end, or to a stop, adding to `records`, which the checkpoints contain."""
    seed, method = job.runs[start.run]
    trainer = Trainer(job, data, here, seed, method)
    if start.trainer is not None:
        trainer.load_state_dict(start.trainer)
    _written(job, partial(report.begin, seed, method, start.step))
    for step in trainer.steps(start.step):
        report.advance()
        stopping, last = stop.agreed(), step == job.steps
        if step % job.eval_every == 0 or last:
            records.append(trainer.evaluate(step))
            _written(job, partial(report.add, records[-1]))
        if step % job.checkpoint_every == 0 or last or stopping:
            _written(job, partial(report.save, Progress(start.run, step, trainer.state_dict(), records)))
        if stopping:
            break
    _written(job, report.end)
    if stopping:
        raise Stopped(f"at step {step} of {method}, seed {seed}; go on with --out {job.out} --resume")


if __name__ == "__main__":
    sys.exit(main())
