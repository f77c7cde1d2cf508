"""W processes, one per rank, that stay alive over many runs; an error in one ends them all, with its traceback."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.real_ranks import RealRank
from benchmarks.accuracy.task import build_task
from benchmarks.accuracy.training import Record, train

PROCESSES = multiprocessing.get_context("forkserver")  # a clean interpreter that imports torch once for all
PROCESSES.set_forkserver_preload(["benchmarks.accuracy.gang", "sklearn.datasets", "torchjd.aggregation"])
LIFE = 20  # runs; each leaves a process group's sockets behind


class RankError(RuntimeError):
    """What the ranks raised, with their tracebacks."""


class Gang:
    """Processes that are one process group (gloo; several may share a GPU). A context manager.

    timeout: seconds a run may take; the ranks give up waiting for each other after a third of that.
    """

    def __init__(self, size: int, folder: Path | None, device: str = "cpu", timeout: float = 1800.0) -> None:
        self._runs, self._timeout, self.size = 0, timeout, size
        self._scratch = tempfile.TemporaryDirectory()
        store = Path(self._scratch.name) / "store"
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(size):
            ours, theirs = PROCESSES.Pipe()
            arguments = (theirs, rank, size, store, folder, device, timeout / 3)
            process = PROCESSES.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    @property
    def worn(self) -> bool:
        """Whether it is time for a fresh one."""
        return self._runs >= LIFE

    def train(self, run: Run, counts: Sequence[int] = ()) -> Record:
        """The record of a run, made by these ranks; `RankError` if one of them failed."""
        self._runs += 1
        for _, pipe in self._ranks:
            pipe.send((run, counts))
        deadline = time.monotonic() + self._timeout
        outcomes = self._outcomes(deadline)
        if isinstance(outcomes[0], str) or len(outcomes) < self.size:
            self.close()
            raise RankError("\n".join(text for text in outcomes if isinstance(text, str)))
        first: Record = outcomes[0]
        return first

    def _outcomes(self, deadline: float) -> list[Any]:
        """Every rank's record, or only the tracebacks of those that failed first."""
        waiting, records = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks)}, {}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                return [f"ranks {sorted(waiting.values())} did not finish in {self._timeout:g} s"]
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                outcome = _receive(pipe)  # type: ignore[arg-type]
                if isinstance(outcome, str):
                    return [f"rank {rank}: {outcome}"]
                records[rank] = outcome
        return [records[rank] for rank in sorted(records)]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []
        self._scratch.cleanup()

    def __enter__(self) -> "Gang":
        """Return this gang."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        """End the processes."""
        self.close()


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return "its process died without a word"


def _serve(
    pipe: Connection, rank: int, size: int, store: Path, folder: Path | None, device: str, timeout: float
) -> None:
    """What a rank does until its pipe is closed."""
    torch.set_num_threads(1)
    os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "0"
    place = torch.device(device, rank % torch.cuda.device_count()) if device == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    wait = timedelta(seconds=timeout)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
        while True:
            run, counts = pipe.recv()
            task = build_task(run, folder)
            pipe.send(train(run, task, RealRank(run, task, place, counts)))
    except EOFError:
        return
    except BaseException:
        pipe.send(traceback.format_exc())
