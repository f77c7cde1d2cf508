"""A process ends after its ballots have arrived: the other ranks still read them, and it is not aborted."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.jobs import REPOSITORY, environment

pytestmark = pytest.mark.ranks

# Rank 0 is slow to send its last ballot. The other ranks have nothing left to do by then.
SCRIPT = """
import atexit, sys, time
atexit.register(lambda: print("after", time.monotonic() - ended, flush=True))  # this one is called last
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.ballots import post

rank, fails = int(sys.argv[1]), sys.argv[3] == "fails"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
model = DistributedDataParallel(torch.nn.Linear(8, 2))
model.register_comm_hook(state := GAFState(), gaf_hook)
gather = post.all_gather_single

def slow(*args, **options):
    if rank == 0 and state.step == 2:
        time.sleep(60 if fails else 1)
    return gather(*args, **options)

post.all_gather_single = slow
for _ in range(3):
    model(torch.randn(4, 8)).sum().backward()
if rank == 0:
    print(state.report())
dist.destroy_process_group()
ended = time.monotonic()
if fails:
    raise SystemError("on purpose")
"""


def ranks(tmp_path: Path, how: str) -> list[subprocess.Popen[str]]:
    own = environment()
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, str(rank), str(tmp_path / "store"), how],
            cwd=REPOSITORY, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip


def seconds(out: str) -> float:
    """Return for how long a rank stayed after its last line."""
    return float(out.rpartition("after ")[2])


def test_the_others_read_the_last_ballot_of_a_rank_that_has_ended(tmp_path: Path) -> None:
    jobs = ranks(tmp_path, "ends")
    try:
        said = [job.communicate(timeout=100) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    assert said[0][0].startswith("step 3, 3 decisions, 3 ranks")
    assert all(seconds(out) > 0.4 for out, _ in said[1:]), said


def test_who_is_not_heard_of_is_not_waited_for(tmp_path: Path) -> None:
    """By us: with torch 2.11 gloo itself waits for it then, as it would for any message."""
    jobs = ranks(tmp_path, "fails")
    try:
        for job in jobs[1:]:
            assert job.stdout is not None
            after = next(line for line in job.stdout if line.startswith("after "))
            assert 1.5 < seconds(after) < 20
    finally:
        for job in jobs:
            job.kill()
        said = [job.communicate()[1] for job in jobs]
    assert all("on purpose" in errors for errors in said[1:]), said
