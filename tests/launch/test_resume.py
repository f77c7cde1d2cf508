"""Jobs that go on to the same bits: after a power cut, after SIGTERM, when torchrun starts them again."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.trainer import Trainer
from tests.launch.dying import DEATHS
from tests.launch.jobs import (
    SEVERAL_BUCKETS,
    Outcome,
    RunRanks,
    assert_same_job,
    environment,
    job_results,
    rank_of_job,
    run_job,
    run_job_until_power_cut,
)
from tools.ranks import RankError

# Where a job goes on after each death of tests/launch/dying.py; checkpoints are four steps apart.
RESTARTED = ["1 at step 4", "1 at step 4", "1 at step 8", "1 at step 12", "2 at step 8"]


def _resume(ranks: RunRanks, world: int, folder: Path, saves: int, *job: object) -> None:
    arguments = [*job, "--out", folder, "--resume"]
    with pytest.raises(RankError, match="rank 0: died with exit code 9"):
        run_job_until_power_cut(ranks, world, arguments, saves)
    (outcome, *_) = run_job(ranks, world, arguments)
    assert "going on with run" in outcome.err
    assert outcome.code == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunRanks], Path]:
    """Return the folder of a job that ran without a stop; made by the first test that asks."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def get(ranks: RunRanks) -> Path:
        if not (folder / "checkpoint.pt").exists():
            run_job(ranks, 3, [*SEVERAL_BUCKETS, "--out", folder])
        return folder

    return get


@pytest.mark.job
@pytest.mark.parametrize("saves", [1, 4], ids=["in the first method", "in the second method"])
def test_a_resumed_job_ends_with_the_same_bits(
    gloo_ranks: RunRanks, tmp_path: Path, uninterrupted: Callable[[RunRanks], Path], saves: int
) -> None:
    whole = uninterrupted(gloo_ranks)
    _resume(gloo_ranks, 3, tmp_path, saves, *SEVERAL_BUCKETS)
    assert_same_job(tmp_path, whole)


@pytest.mark.job
def test_a_job_can_go_on_with_fewer_ranks(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    job = ["--seeds", 1, "--steps", 40, "--corrupt-ranks", 0, "--checkpoint-every", 20]
    job += ["--out", tmp_path, "--resume"]
    with pytest.raises(RankError):
        run_job_until_power_cut(gloo_ranks, 3, job, saves=3)
    assert [outcome.code for outcome in run_job(gloo_ranks, 2, job)] == [0, 0]
    last = job_results(tmp_path)["gaf"][0]
    assert len(last.kept) == 2
    assert last.final > 60


@pytest.mark.job
def test_a_finished_job_is_shown_again_and_not_overwritten(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    job = ["--seeds", 1, "--steps", 4, "--out", tmp_path]
    first, again = (run_job(gloo_ranks, 2, [*job, *resume])[0].out.splitlines() for resume in ([], ["--resume"]))
    assert first[:-1] == again[:-1]  # the last line tells the time it took
    refused = run_job(gloo_ranks, 2, job)
    assert [outcome.code for outcome in refused] == [2, 2]
    assert "--out must be a new folder, or be given with --resume" in refused[0].err


@pytest.mark.job
def test_a_finished_job_goes_on_to_more_steps_with_the_same_bits(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    job = [*SEVERAL_BUCKETS, "--method", "gaf"]
    for out, steps in (("whole", 16), ("longer", 12), ("longer", 16)):
        outcomes = run_job(gloo_ranks, 2, [*job, "--steps", steps, "--out", tmp_path / out, "--resume"])
        assert [outcome.code for outcome in outcomes] == [0, 0]
    assert "going on with run 1 at step 12, 1 runs of 16 steps" in outcomes[0].err
    assert_same_job(tmp_path / "longer", tmp_path / "whole")


def _sigterm_on_rank_1(device: torch.device, port: int, arguments: list[str]) -> Outcome:
    """Send SIGTERM to the rank in the middle of the filter's fourth step."""
    real_backward = Trainer._backward

    def backward(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.here.rank == 1 and self.state is not None and self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_backward(self, images, labels)

    Trainer._backward = backward  # type: ignore[method-assign]
    return rank_of_job(device, port, arguments)


def test_sigterm_saves_all_and_the_job_ends_with_the_same_bits(
    gloo_ranks: RunRanks, tmp_path: Path, uninterrupted: Callable[[RunRanks], Path]
) -> None:
    """One rank is told; all stop after the step that follows, between two evaluations."""
    whole = uninterrupted(gloo_ranks)
    job = [*SEVERAL_BUCKETS, "--out", tmp_path, "--resume"]
    outcomes = run_job(gloo_ranks, 3, job, body=_sigterm_on_rank_1)
    assert [outcome.code for outcome in outcomes] == [143, 143, 143]
    last = f"stopped by SIGTERM at step 5 of gaf, seed 0; go on with --out {tmp_path} --resume"
    assert outcomes[0].err.splitlines()[-1] == f"launch.train: {last}"
    (outcome, *_) = run_job(gloo_ranks, 3, job)
    assert "going on with run 2 at step 5" in outcome.err
    assert outcome.out.splitlines()[-1].startswith("done in ")
    assert_same_job(tmp_path, whole)


@pytest.mark.job
@pytest.mark.timeout(500)
def test_torchrun_starts_a_job_again_whose_ranks_are_killed(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    """Five times in a row, each time another rank or at another step; no variable is set."""
    run_job(gloo_ranks, 2, [*SEVERAL_BUCKETS, "--compare", "gaf,paper", "--out", tmp_path / "whole"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = [*SEVERAL_BUCKETS, "--compare", "gaf,paper", "--out", tmp_path / "killed", "--resume"]
    done = subprocess.run(
        [*torchrun, "--max-restarts", str(len(DEATHS)), "-m", "tests.launch.dying", *map(str, job)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    starts = [line for line in done.stderr.splitlines() if "ranks with wrong labels" in line]
    places = [line.split("; ")[1].rsplit(",")[0] for line in starts]
    assert places == ["starting", *(f"going on with run {place}" for place in RESTARTED)]
    assert_same_job(tmp_path / "killed", tmp_path / "whole")
