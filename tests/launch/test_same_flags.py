"""Ranks that were started with different flags say so at once; none trains or waits."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.launch.jobs import Outcome, RunRanks, rank_of_job, run_job
from tests.marks import job_but

JOB = "--steps 40 --seeds 1 --out"


def _unlike_rank(device: torch.device, port: int, arguments: list[str]) -> Outcome:
    """Run a rank whose flags are the one of the texts that has its number."""
    return rank_of_job(device, port, arguments[dist.get_rank()].split())


DIFFERENT = [
    ("--lr 0.1", "--lr must be the same on every rank, found 0.05 on rank 0 and 0.1 on rank 2"),
    ("--weight-decay 0", "--weight-decay must be the same on every rank, found 0.0001 on rank 0 and 0.0 on"),
    ("--optimizer adam", "--optimizer must be the same on every rank, found sgd on rank 0 and adam on rank 2"),
    (
        "--method tau",
        "--method or --compare must be the same on every rank, found average,tau,consensus on rank 0",
    ),
    ("--eval-every 3", "--eval-every must be the same on every rank, found unset on rank 0 and 3 on rank 2"),
    ("--resume", "--resume must be the same on every rank, found False on rank 0 and True on rank 2"),
    ("--out elsewhere", "--out must be the same on every rank, found "),
    ("--seed 1 --amp bf16", "found none on rank 0 and bf16 on rank 2; --seed must be the same on every rank"),
]


@pytest.mark.parametrize(("flags", "message"), job_but(DIFFERENT[0], DIFFERENT[-1], of=DIFFERENT))
def test_a_flag_that_differs_is_named_and_ends_every_rank(
    gloo_ranks: RunRanks, tmp_path: Path, flags: str, message: str
) -> None:
    """Waiting for the others would take longer than the test may."""
    usual = f"{JOB} {tmp_path}/out"
    outcomes = run_job(gloo_ranks, 3, [usual, usual, f"{usual} {flags}"], body=_unlike_rank, timeout=40)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2]
    assert outcomes[0].err.startswith("launch.train: error: --")
    assert message in outcomes[0].err
    assert outcomes[0].err.count("\n") == 1
    assert [outcome.err for outcome in outcomes[1:]] == ["", ""]
    assert not (tmp_path / "out").exists()


def _rank_with_an_old_torch(device: torch.device, port: int, arguments: list[str]) -> Outcome:
    if dist.get_rank() == 1:
        torch.__version__ = "2.0"  # type: ignore[assignment]
    return rank_of_job(device, port, arguments)


def test_versions_of_torch_are_compared(gloo_ranks: RunRanks) -> None:
    outcomes = run_job(gloo_ranks, 2, [], body=_rank_with_an_old_torch, timeout=30)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    found = f"found {torch.__version__} on rank 0 and 2.0 on rank 1"
    assert outcomes[0].err == f"launch.train: error: torch must be the same on every rank, {found}\n"
