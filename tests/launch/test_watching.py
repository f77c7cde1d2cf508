"""Jobs that compare their replicas, and what ranks make of one batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.trainer import Trainer
from tests.launch.jobs import Outcome, RunRanks, rank_of_job, run_job

JOB = ["--compare", "average,tau", "--seeds", 1, "--steps", 12, "--check-every", 3, "--audit-every", 4]


def _rank_1_is_broken(device: torch.device, port: int, arguments: list[str]) -> Outcome:
    """Run the job; on rank 1, from its sixth backward on, weights or arithmetic are a little off."""
    how, backward, count = arguments.pop(), Trainer._backward, 0

    def broken(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 6 and dist.get_rank() == 1:
            weight = next(self.model.parameters())
            if how == "weights":
                with torch.no_grad():
                    weight[0, 0] += 1e-6
            else:
                weight.register_hook(lambda gradient: gradient * (1 + 1e-6))
        return backward(self, images, labels)

    Trainer._backward = broken  # type: ignore[method-assign]
    return rank_of_job(device, port, arguments)


@pytest.mark.job
def test_a_sound_job_goes_to_its_end(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    assert [outcome.code for outcome in run_job(gloo_ranks, 3, [*JOB, "--out", tmp_path])] == [0] * 3


@pytest.mark.job
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights", "parameters must be the same on every rank, found others on rank 1"),
        ("arithmetic", "gradients of one batch must be the same on every rank, found rank 1"),
    ],
)
def test_a_broken_rank_is_named(gloo_ranks: RunRanks, tmp_path: Path, how: str, message: str) -> None:
    outcomes = run_job(gloo_ranks, 3, [*JOB, "--out", tmp_path, how], body=_rank_1_is_broken)
    assert [outcome.code for outcome in outcomes] == [2] * 3
    assert message in outcomes[0].err.splitlines()[-1]
