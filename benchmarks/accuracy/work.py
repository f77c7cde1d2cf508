"""Making the runs that are missing: many at a time in one process each, real ranks one run after the other."""

import multiprocessing
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.one_process import OneProcess
from benchmarks.accuracy.real_ranks import train_rank
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.task import build_task
from benchmarks.accuracy.training import Record, train
from tools.ranks import run_ranks

Job = tuple[Run, Path | None, Sequence[int]]
LONGEST = 1800.0  # seconds of a run on real ranks


def make(runs: Sequence[Run], store: Store, folder: Path | None, jobs: int) -> None:
    """Train what the store does not have yet, and this code can make."""
    missing = [run for run in runs if run not in store and not run.rule.is_past]
    alone = [run for run in missing if run.engine == "one process"]
    real = [run for run in missing if run.engine == "ddp"]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", smoothing=0.05) as bar:
        for run, record in chain(_alone(alone, store, folder, jobs), _on_real_ranks(real, store, folder)):
            store.add(run, record)
            bar.update()


def _job(run: Run, store: Store, folder: Path | None) -> Job:
    """Return what a run needs; one that repeats another can only be asked for when that is in the store."""
    return run, folder, () if run.rule.like is None else store.counts(replace(run, rule=run.rule.like))


def _alone(runs: Sequence[Run], store: Store, folder: Path | None, jobs: int) -> Iterator[tuple[Run, Record]]:
    """Make runs, several at a time; those that repeat others after all the others."""
    if jobs == 1:  # in this process: a stop signal to it is one to its work
        yield from (_train_one(_job(run, store, folder)) for run in runs)
    elif runs:
        with multiprocessing.get_context("forkserver").Pool(min(jobs, len(runs)), initializer=_prepare) as pool:
            for repeats in (False, True):
                due = [run for run in runs if (run.rule.like is not None) == repeats]
                yield from pool.imap_unordered(_train_one, [_job(run, store, folder) for run in due])


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends the pool
    torch.set_num_threads(1)


def _train_one(job: Job) -> tuple[Run, Record]:
    run, folder, counts = job
    task = build_task(run, folder)
    ranks = OneProcess(run, task, counts)
    return run, train(run, task, ranks.model, ranks.step) | ranks.distances()


def _on_real_ranks(runs: Sequence[Run], store: Store, folder: Path | None) -> Iterator[tuple[Run, Record]]:
    """Make runs one after the other, by a process for each rank."""
    for run in runs:
        job = _job(run, store, folder)
        with tempfile.TemporaryDirectory() as scratch:
            yield (
                run,
                run_ranks(
                    len(run.ranks),
                    train_rank,
                    *job,
                    folder=Path(scratch),
                    timeout=LONGEST,
                    group_timeout=LONGEST / 3,
                )[0],
            )
