"""Runs one job's processes with a time limit; a hang or a crash of theirs leaves the caller alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.on_gpu.job import STORE

ROOT = Path(__file__).parent.parent.parent
_GRACE = 8.0  # seconds that ranks may go on once one of them has failed


def run_processes(
    arguments: Sequence[str], count: int, seconds: float, folder: Path, environment: Mapping[str, str]
) -> tuple[str, str]:
    """Run python with these arguments as so many ranks, in this repository.

    Returns:
        What went wrong, "" if nothing did, and the output of the rank that it went wrong on first, of all else.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(count)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        ranks += [_start(arguments, rank, count, folder, logs[rank], environment) for rank in range(count)]
        wrong, culprit = _wait(ranks, time.monotonic() + seconds, seconds)
    finally:
        for rank in ranks:
            _kill(rank)
    told = [log.read_text(errors="replace") for log in logs if log.exists()]
    return wrong, told[culprit] if culprit is not None else "".join(told)


def _start(
    arguments: Sequence[str], rank: int, count: int, folder: Path, log: Path, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    own = {"RANK": str(rank), "WORLD_SIZE": str(count), STORE: str(folder / "store")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **own, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts can be ended with it
        )


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], deadline: float, seconds: float) -> tuple[str, int | None]:
    """Wait for all ranks; return what went wrong, and on which rank."""
    wrong: str = ""
    culprit: int | None = None
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
        failed = [place for place, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
        if failed and culprit is None:
            culprit, deadline = failed[0], min(deadline, time.monotonic() + _GRACE)
    failed = [place for place, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
    if failed:
        culprit = failed[0] if culprit is None else culprit
        wrong = f"rank {culprit} ended with exit code {ranks[culprit].returncode}"
    elif any(rank.poll() is None for rank in ranks):
        wrong = f"not done in {seconds:.0f} s, and ended"
    return wrong, culprit


def _kill(rank: "subprocess.Popen[bytes]") -> None:
    """End a rank and what it started, which may outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
