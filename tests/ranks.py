"""Runs a function on W real ranks: one process each, a file store, gloo or NCCL, a time-out that fails."""

import multiprocessing
import os
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A fork server starts a clean interpreter, imports torch once, and forks the ranks from there: like spawn, but
# without W imports of torch per test.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "gaf_ddp"])


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

    Raises RankError with every rank's traceback if any rank raised or the time-out (seconds) passed; no process
    outlives the call.
    """
    store = folder / f"store-{uuid.uuid4().hex}"
    ranks = [_Rank(rank, world_size, store, backend, group_timeout, body, args) for rank in range(world_size)]
    deadline = time.monotonic() + timeout
    try:
        outcomes = [rank.outcome(deadline) for rank in ranks]
    finally:
        for rank in ranks:
            rank.stop()
    failures = {i: text for i, (ok, text) in enumerate(outcomes) if not ok}
    if failures:
        raise RankError(failures)
    return [value for _, value in outcomes]


class _Rank:
    def __init__(self, rank: int, world_size: int, *rest: Any) -> None:
        self._pipe, theirs = _processes.Pipe(duplex=False)
        self._process = _processes.Process(target=_main, args=(theirs, rank, world_size, *rest), daemon=True)
        self._process.start()
        theirs.close()

    def outcome(self, deadline: float) -> tuple[bool, Any]:
        try:
            if self._pipe.poll(max(0.0, deadline - time.monotonic())):
                ok, value = self._pipe.recv()
                return bool(ok), value
        except EOFError:
            self._process.join(5)
            return False, f"died with exit code {self._process.exitcode}"
        return False, "did not finish in time"

    def stop(self) -> None:
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _main(
    pipe: Connection,
    rank: int,
    world_size: int,
    store: Path,
    backend: str,
    group_timeout: float,
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "0"
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        value = body(device, *args)
        dist.destroy_process_group()
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
