"""One job in which something breaks: its processes, and what became of them."""

import json
import multiprocessing
import os
import tempfile
import time
from contextlib import nullcontext
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.declare import GROUP_TIMEOUT, VICTIM, WORLD_SIZE, Fault
from benchmarks.faults.rank import train
from tools.hosts import Hosts

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch.nn.parallel", "torch._dynamo", "benchmarks.faults.rank"])
_LIMIT = 60.0  # seconds to start in, and to find every hang
_NONE_LEFT = 10.0  # seconds a rank may take to leave once it has reported


class Outcome(NamedTuple):
    """What became of a job.

    Attributes:
        setup: how it averages.
        fault: what broke.
        verdict: `"finished"`, `"raised"`, `"killed"` or `"HANG"`, of the worst survivor.
        seconds: from the fault to the last survivor's exception, 0 where there is none.
        gone: seconds from the fault until the last survivor's process had ended.
        equal: whether survivors had the same bits after every step that they took.
        said: what the survivors were told, each once.
        victim: what the rank that broke was told.
    """

    setup: str
    fault: Fault
    verdict: str
    seconds: float
    gone: float
    equal: bool
    said: list[str]
    victim: str

    @property
    def is_fine(self) -> bool:
        """Whether nobody hung, nobody differs, and everyone was told in time."""
        wanted = self.verdict == "finished" if self.fault.finishes else self.verdict != "HANG"
        return wanted and self.equal and self.seconds <= self.fault.limit


def run(setup: str, fault: Fault) -> Outcome:
    """Start a job, let it break, and wait for its end; no process outlives the call."""
    network: Any = Hosts(WORLD_SIZE) if fault.on_links else nullcontext()
    with tempfile.TemporaryDirectory() as name, network as hosts:
        folder = Path(name)
        places = [(host, hosts.switch) for host in hosts.names] if hosts else [None] * WORLD_SIZE
        ranks = [
            _processes.Process(target=train, args=(setup, fault, rank, folder, place))
            for rank, place in enumerate(places)
        ]
        for rank in ranks:
            rank.start()
        try:
            ended = _ends(ranks, fault, folder)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return _judge(setup, fault, folder, ended)


def _ends(ranks: list[Any], fault: Fault, folder: Path) -> dict[int, float]:
    """Wait for all ranks that can end; return when each did."""
    ended: dict[int, float] = {}
    deadline = time.monotonic() + _LIMIT
    waiting = {process.sentinel: rank for rank, process in enumerate(ranks)}
    if fault.what == "stop" and not fault.finishes:
        del waiting[ranks[VICTIM].sentinel]
    while waiting and time.monotonic() < deadline:
        for sentinel in connection.wait(list(waiting), timeout=0.2):
            ended[waiting.pop(sentinel)] = time.monotonic()
        noted = folder / "noted"
        if noted.exists() and noted.stat().st_size:
            last = float(noted.read_text()) + 2 * GROUP_TIMEOUT + _NONE_LEFT
            deadline = min(deadline, last)
    return ended


def _judge(setup: str, fault: Fault, folder: Path, ended: dict[int, float]) -> Outcome:
    reports: dict[int, dict[str, Any]] = {}
    for rank in range(WORLD_SIZE):
        if (folder / f"rank-{rank}.json").exists():
            reports[rank] = json.loads((folder / f"rank-{rank}.json").read_text())
    noted = folder / "noted"
    start = float(noted.read_text()) if noted.exists() else time.monotonic()
    survivors = [rank for rank in range(WORLD_SIZE) if rank != VICTIM or fault.on_all]
    if fault.finishes:
        survivors = list(range(WORLD_SIZE))
    errors = [error for rank in survivors for error in reports.get(rank, {}).get("errors", [])]
    final = [error for error in errors if not error["caught"]]
    if any(rank not in ended for rank in survivors):
        verdict = "HANG"
    elif not all(rank in reports for rank in survivors):
        verdict = "killed"
    else:
        verdict = "raised" if final else "finished"
    own = reports.get(VICTIM, {}).get("errors", [])
    return Outcome(
        setup,
        fault,
        verdict,
        max((error["at"] - start for error in final), default=0.0),
        max((ended[rank] - start for rank in survivors if rank in ended), default=0.0) if noted.exists() else 0.0,
        _are_equal([reports[rank]["hashes"] for rank in survivors if rank in reports]),
        sorted({f"{error['kind']}: {error['text']}" for error in final}),
        " / ".join(f"{error['kind']}: {error['text']}" for error in own) or "nothing",
    )


def _are_equal(hashes: list[dict[str, str]]) -> bool:
    """Return whether parameters had the same bits after each step that two ranks took."""
    steps = {step for of_rank in hashes for step in of_rank}
    return all(len({of_rank[step] for of_rank in hashes if step in of_rank}) == 1 for step in steps)


def seen() -> dict[str, str]:
    """Return what the results depend on."""
    import torch

    return {"torch": torch.__version__, "cores": str(os.cpu_count()), "date": time.strftime("%Y-%m-%d")}
