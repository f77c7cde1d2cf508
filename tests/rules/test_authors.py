"""The same steps as the authors' own code, `gradient_agreement_filtering.step_GAF`, on the same micro-batches."""

from collections.abc import Callable
from typing import Any, Literal

import gradient_agreement_filtering
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from gaf_ddp import GAFState, MicrobatchFilter, SequentialAgreement, gaf_hook, skip_on_disagreement
from tests.marks import job_but
from tests.nets import assert_replicas_equal, ddp, flat_parameters, mlp

Ranks = Callable[..., list[Any]]
Running = Literal["mean", "half"]

STEPS, SIZE = 25, 4
# (W, tau, running) with which some of the steps are skipped: for W = 2 both rules are the same.
CASES = [(2, 0.97, "mean"), (2, 0.97, "half"), (4, 0.7, "half")]


def data() -> TensorDataset:
    """Return noise with random labels: gradients that often disagree."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(STEPS * 4 * SIZE, 12, generator=generator)
    return TensorDataset(inputs, torch.randint(5, (len(inputs),), generator=generator))


def micro_batches(world_size: int, step: int) -> list[Dataset[Any]]:
    starts = [(step * world_size + i) * SIZE for i in range(world_size)]
    return [Subset(data(), range(start, start + SIZE)) for start in starts]


def loss_of(model: nn.Module, batch: Dataset[Any], device: torch.device | str = "cpu") -> Any:
    inputs, labels = zip(*(batch[i] for i in range(SIZE)), strict=True)
    return nn.functional.cross_entropy(model(torch.stack(inputs).to(device)), torch.stack(labels).to(device))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def authors(world_size: int, tau: float) -> tuple[Tensor, list[bool]]:
    """Return the parameters after the authors' steps, and which of them were taken."""
    model, taken = mlp(), []
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        result = gradient_agreement_filtering.step_GAF(
            model,
            optimizer,
            nn.CrossEntropyLoss(),
            micro_batches(world_size, step),
            wandb=False,
            verbose=False,
            cos_distance_thresh=tau,
        )
        taken.append(result["agreed_count"] > 0)
    return flat_parameters(model), taken


def train_by_ranks(device: torch.device, world_size: int, tau: float, running: Running) -> tuple[Tensor, list[bool]]:
    model, taken = ddp(mlp(), device), []
    state = GAFState(weighting=SequentialAgreement(tau, running=running), scope="model")
    model.register_comm_hook(state, gaf_hook)
    optimizer = make_optimizer(model)
    skip_on_disagreement(optimizer, state)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, micro_batches(world_size, step)[dist.get_rank()], device).backward()
        optimizer.step()
        assert state.agreement is not None
        taken.append(bool(state.agreement.agreed))
        assert_replicas_equal(model)
    return flat_parameters(model).cpu(), taken


def train_by_micro_batches(world_size: int, tau: float, running: Running) -> tuple[Tensor, list[bool]]:
    model, taken = mlp(), []
    optimizer = make_optimizer(model)
    micro = MicrobatchFilter(model.parameters(), tau, running=running)
    for step in range(STEPS):
        for batch in micro_batches(world_size, step):
            loss_of(model, batch).backward()
            micro.accumulate()
        taken.append(micro.finish())
        if taken[-1]:
            optimizer.step()
        optimizer.zero_grad()
    return flat_parameters(model), taken


@pytest.mark.parametrize(("world_size", "tau", "running"), job_but(CASES[0], of=CASES))
class TestAuthors:
    def test_ranks_take_their_steps(self, ranks: Ranks, world_size: int, tau: float, running: Running) -> None:
        expected, taken = authors(world_size, tau)
        assert 5 <= sum(taken) <= STEPS - 5, "the case should have both: steps taken and steps skipped"
        for parameters, taken_here in ranks(world_size, train_by_ranks, world_size, tau, running):
            assert taken_here == taken
            torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-5)

    def test_micro_batches_take_their_steps(self, world_size: int, tau: float, running: Running) -> None:
        expected, taken = authors(world_size, tau)
        parameters, taken_here = train_by_micro_batches(world_size, tau, running)
        assert taken_here == taken
        torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-5)
