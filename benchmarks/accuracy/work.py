"""Making the runs that are missing: many at a time in one process each, real ranks one run after the other."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy.arms import real_runs_of, runs_of
from benchmarks.accuracy.declare import Experiment, Run
from benchmarks.accuracy.gang import PROCESSES, Gang
from benchmarks.accuracy.one_process import OneProcess
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.task import build_task
from benchmarks.accuracy.training import Record, train

Job = tuple[Run, Sequence[int], Path | None]


def all_runs(experiments: Iterable[Experiment]) -> list[Run]:
    """Every run the experiments need, once, real ranks last; what others repeat comes before them."""
    pairs = [(e, arm) for e in experiments for arm in e.arms]
    runs = [run for e, arm in pairs for run in (*runs_of(e, arm), *real_runs_of(e, arm))]
    needed = [replace(run, rule=run.rule.like) for run in runs if run.rule.like is not None]
    unique = {run.key: run for run in (*needed, *runs)}
    return sorted(unique.values(), key=lambda run: (run.engine == "ddp", run.rule.like is not None))


def make(runs: Sequence[Run], store: Store, folder: Path | None, jobs: int, device: str) -> None:
    """Train what the store does not have yet."""
    missing = [run for run in runs if run not in store]
    alone = [run for run in missing if run.engine == "one process"]
    real = [run for run in missing if run.engine == "ddp"]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", smoothing=0.05) as bar:
        made = chain(_in_one_process(alone, store, folder, jobs), _on_real_ranks(real, store, folder, device))
        for run, record in made:
            store.add(run, record)
            bar.set_postfix_str(run.name, refresh=False)
            bar.update()


def _job(run: Run, store: Store, folder: Path | None) -> Job:
    """What a run needs; one that repeats another can only be asked for when that is in the store."""
    counts = store.counts(replace(run, rule=run.rule.like)) if run.rule.like is not None else ()
    return run, counts, folder


def _in_one_process(
    runs: Sequence[Run], store: Store, folder: Path | None, jobs: int
) -> Iterator[tuple[Run, Record]]:
    """Make runs, several at a time; those that repeat others after all the others."""
    if not runs:
        return
    with PROCESSES.Pool(min(jobs, len(runs)), initializer=_prepare) as pool:
        for repeats in (False, True):
            due = [run for run in runs if (run.rule.like is not None) == repeats]
            yield from pool.imap_unordered(_train_one, [_job(run, store, folder) for run in due])


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends the pool
    torch.set_num_threads(1)


def _train_one(job: Job) -> tuple[Run, Record]:
    run, counts, folder = job
    task = build_task(run, folder)
    return run, train(run, task, OneProcess(run, task, counts))


def _on_real_ranks(
    runs: Sequence[Run], store: Store, folder: Path | None, device: str
) -> Iterator[tuple[Run, Record]]:
    """Make runs one after the other, by ranks that stay alive while the next run is as wide."""
    gang: Gang | None = None
    try:
        for run in sorted(runs, key=lambda run: (run.rule.like is not None, len(run.ranks))):
            if gang is None or gang.size != len(run.ranks) or gang.worn:
                if gang is not None:
                    gang.close()
                gang = Gang(len(run.ranks), folder, device)
            yield run, gang.train(run, _job(run, store, folder)[1])
    finally:
        if gang is not None:
            gang.close()


def processors() -> int:
    """How many runs to make at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else multiprocessing.cpu_count()
