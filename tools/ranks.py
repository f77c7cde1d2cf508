"""Runs a function on W real ranks: one process each, a file store, gloo or NCCL, a time-out that fails."""

import gc
import multiprocessing
import os
import pickle
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A fork server starts a clean interpreter, imports once what all tests need, and forks the ranks from there: like
# spawn, but without W imports of torch per test.
_processes = multiprocessing.get_context("forkserver")
_TORCH = ["torch", "torch.distributed", "torch.nn.parallel", "torch.distributed.fsdp", "torch._dynamo"]
_OTHERS = ["numpy", "pytest", "gaf_ddp", "launch.train", "sklearn.datasets", "matplotlib.figure"]
_processes.set_forkserver_preload([*_TORCH, *_OTHERS])

# Starting a process also collects the exit codes of others that ended: a code that two threads read at once is 255
# for the slower one (multiprocessing/popen_forkserver.py, `poll`).
_exit_codes = threading.Lock()

_GRACE = 10.0  # seconds the other ranks may go on once one has failed: they may only be waiting for it


class RankError(AssertionError):
    """What the ranks raised, with their tracebacks."""

    def __init__(self, failures: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        self.failures = failures


def run_ranks(
    world_size: int,
    body: Callable[..., Any],
    *args: Any,
    folder: Path,
    backend: str = "gloo",
    timeout: float = 90.0,
    group_timeout: float = 60.0,
) -> list[Any]:
    """Call `body(device, *args)` on each rank of a fresh group and return what the ranks returned, in order.

    A rank ends its default group after body, unless body did. Warnings are errors there, save the hook's at W = 1 and 2
    and, without `GAF_DDP_STRICT_WARNINGS=1`, those of what is deprecated. Body, args and what it returns are
    pickled: body is a function at the top of a module.

    Raises RankError with every rank's traceback if any rank raised, did not exit with code 0 after it returned,
    or the time-out (seconds) passed; no process outlives the call.
    """
    store = folder / f"store-{uuid.uuid4().hex}"
    task = pickle.dumps((body, args))  # by value: tensors in shared memory would die with their owner
    ranks = [_Rank(rank, world_size, store, backend, group_timeout, task) for rank in range(world_size)]
    try:
        _collect(ranks, time.monotonic() + timeout)
    finally:
        for rank in ranks:
            rank.stop()
    failures = {i: rank.failure for i, rank in enumerate(ranks) if rank.failure is not None}
    if failures:
        raise RankError(failures)
    return [rank.value for rank in ranks]


def _collect(ranks: list["_Rank"], deadline: float) -> None:
    """Wait until every rank has reported, or the deadline passed."""
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            rank.receive()
            if rank.failure is not None:
                deadline = min(deadline, time.monotonic() + _GRACE)


class _Rank:
    def __init__(self, rank: int, world_size: int, *rest: Any) -> None:
        self.failure: str | None = "did not finish in time"
        self.value: Any = None
        self.pipe, theirs = _processes.Pipe(duplex=False)
        self._process = _processes.Process(target=_main, args=(theirs, rank, world_size, *rest), daemon=True)
        with _exit_codes:
            self._process.start()
        theirs.close()

    def receive(self) -> None:
        try:
            self.failure, self.value = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.failure = f"died with exit code {self._exit_code(5)}"

    def stop(self) -> None:
        code = self._exit_code(5 if self.failure is None else 0)
        if code != 0 and self.failure is None:
            self.failure = f"returned, but its exit code 5 s later was {code}"
        if code is None:
            self._process.kill()
            connection.wait([self._process.sentinel])
        self.pipe.close()

    def _exit_code(self, seconds: float) -> int | None:
        """Return the process's exit code, or None if it still runs so many seconds later."""
        connection.wait([self._process.sentinel], seconds)
        with _exit_codes:
            return self._process.exitcode


def _main(
    pipe: connection.Connection, rank: int, world_size: int, store: Path, backend: str, seconds: float, task: bytes
) -> None:
    gc.freeze()  # what the fork server imported: a walk over all objects would copy its pages into every rank
    torch.set_num_threads(1)
    os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "0"
    _make_warnings_errors()
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        dist.barrier()  # a rank whose body needs no other must not leave while they still connect
        body, args = pickle.loads(task)
        value = body(device, *args)
        if dist.is_initialized():
            dist.destroy_process_group()
        report = pickle.dumps((None, value))
    except BaseException:
        report = pickle.dumps((traceback.format_exc(), None))
    pipe.send_bytes(report)


def _make_warnings_errors() -> None:
    warnings.simplefilter("error")
    # A new torch deprecates what it likes, and blames the module that calls it: no reason to fail a user's tests.
    if os.environ.get("GAF_DDP_STRICT_WARNINGS") != "1":
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("default", category)
    warnings.filterwarnings("ignore", message=r"gaf_ddp: (world size [12],|voters='host' needs)")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # the one that _main sets
