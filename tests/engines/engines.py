"""Engines that average gradients by themselves, each with one of its ranks turned, and what they must come to."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp import GAFState, filter_parameters
from tests.nets import mlp

STEPS = 40
TARGET = torch.randn(12, 5, generator=torch.Generator().manual_seed(7))

Steps = Callable[[Tensor], None]  # of one training step, from the loss's backward to the optimizer's step


class Engine(NamedTuple):
    """A model in an engine.

    Attributes:
        model: is called with inputs `(n, 12)`.
        parameters: that filter_parameters is given.
        step: takes the loss; zeroes gradients, goes backward, averages, and takes the optimizer's step.
        values: returns all parameters, `(N,)` float64, from every rank.
    """

    model: Any
    parameters: Sequence[Tensor]
    step: Steps
    values: Callable[[], Tensor]


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Return inputs `(16, 12)` and labels `(16,)` that can be learned."""
    inputs = torch.randn(16, 12, generator=torch.Generator().manual_seed(1000 * rank + step))
    return inputs, (inputs @ TARGET).argmax(1)


def train(engine: Engine, bad: int | None, state: GAFState | None, steps: int = STEPS) -> Tensor:
    """Train with the loss of one rank negated; return who was kept after each step, bool `(steps, W)`."""
    if state is not None:
        filter_parameters(engine.parameters, state)
    kept = []
    rank = dist.get_rank()
    for step in range(steps):
        inputs, labels = batch(rank, step)
        loss = nn.functional.cross_entropy(engine.model(inputs), labels)
        engine.step(-loss if rank == bad else loss)
        if state is not None:
            state.advance()
            assert state.agreement is not None
            kept.append(state.agreement.kept)
    return torch.stack(kept) if kept else torch.empty(0)


def reference(kept: Tensor, bad: int | None, lr: float = 0.1) -> Tensor:
    """Return the parameters after plain SGD on the mean gradient of who counts in each step, `(N,)` float64.

    In the first step all do, then who was kept after the last one.
    """
    model = mlp()
    counted = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    for step, ranks in enumerate(counted):
        model.zero_grad()
        for rank in ranks.nonzero().flatten().tolist():
            inputs, labels = batch(rank, step)
            loss = nn.functional.cross_entropy(model(inputs), labels) / int(ranks.sum())
            (-loss if rank == bad else loss).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=lr)
    return torch.cat([each.detach().double().flatten() for each in model.parameters()])


def assert_filtered(make: Callable[[], Engine], bad: int = 1, to: float | None = 1e-5) -> None:
    """Assert what every engine must do.

    With all kept it has its own result. A turned rank is out by half of the steps, and the others are in;
    where it computes in float32 the parameters are what plain SGD on the mean of those that count comes to.
    """
    plain, kept_all = make(), make()
    train(plain, None, None, 5)
    kept = train(kept_all, None, GAFState(), 5)
    if bool(kept.all()):
        assert torch.equal(plain.values(), kept_all.values())
    watched = make()
    train(watched, None, GAFState(watch=True), 5)
    assert torch.equal(plain.values(), watched.values())
    engine = make()
    kept = train(engine, bad, GAFState())
    others = [rank for rank in range(dist.get_world_size()) if rank != bad]
    assert kept[STEPS // 2 :, bad].double().mean() <= 0.1, kept[:, bad]
    assert kept[:, others].double().mean() >= 0.9, kept[:, others]
    if to is not None:
        difference = (engine.values() - reference(kept, bad)).abs().max()
        assert difference <= to, difference


def by_hand() -> Engine:
    """Return a loop with all_reduce."""
    model = mlp()

    def step(loss: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.sub_(parameter.grad, alpha=0.1 / dist.get_world_size())

    return Engine(model, list(model.parameters()), step, lambda: values_of(model.parameters()))


def values_of(parameters: Any) -> Tensor:
    """Return all parameters as a vector `(N,)` float64."""
    return torch.cat([each.detach().double().flatten() for each in parameters])
