"""Models of fully_shard, and what is done with them, for tests of filter_fsdp."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from gaf_ddp import GAFState, filter_fsdp
from tests.nets import Probe, mlp

SIZES = [[301, 70], [117], [53]]  # of the parameters of each unit, the last one is the root


class Probes(nn.Module):
    """Units that get the gradients a test wants: `model(g)` with g `(N,)`, to the bit."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Probe(sizes) for sizes in SIZES[:-1])
        self.outer = nn.Parameter(torch.arange(float(SIZES[-1][0])))

    def forward(self, gradients: Tensor, but: int = -1) -> Tensor:
        """Return a loss; the inner unit of number `but` is not used."""
        *inner, outer = split(gradients)
        losses = [unit(g) for i, (unit, g) in enumerate(zip(self.inner, inner, strict=True)) if i != but]
        return torch.stack([*losses, (self.outer * outer).sum()]).sum()


def count() -> int:
    """Return N, the elements of all units."""
    return sum(map(sum, SIZES))


def split(gradients: Tensor) -> tuple[Tensor, ...]:
    """Return the units' parts of a vector `(N,)`, in the model's order."""
    return torch.split(gradients, list(map(sum, SIZES)))


def probes(**options: Any) -> Any:
    """Return the `Probes`, sharded: it is an FSDPModule too then."""
    model = Probes()
    for unit in model.inner:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def network(**options: Any) -> Any:
    """Return a network of four units, sharded, whose root has the last layer."""
    model = mlp()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def whole(tensor: Tensor | None) -> Tensor:
    """Return a sharded tensor as one vector, float64."""
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach().double().flatten()


def gradients_of(model: nn.Module) -> Tensor:
    """Return the gradients of a model's units in the model's order, `(N,)`; of the probes as given."""
    if isinstance(model, Probes):
        return torch.cat([whole(p.grad) for p in [*model.inner.parameters(), model.outer]])
    return torch.cat([whole(p.grad) for p in model.parameters()])


def parameters_of(model: nn.Module) -> Tensor:
    """Return all parameters, `(N,)`."""
    return torch.cat([whole(p) for p in model.parameters()])


def train(model: nn.Module, state: GAFState | None, steps: int = 2, divisor: float | None = None) -> Tensor:
    """Return the parameters after some steps of clipped SGD on this rank's own data.

    Args:
        model: a sharded network.
        state: its filter, or None for none.
        steps: backwards, and steps of the optimizer.
        divisor: of the sum of gradients, torch asks for sums then; None is W, and averages.
    """
    if state is not None:
        filter_fsdp(model, state)
    for unit in model.modules():
        if divisor is not None and isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(divisor)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 12, generator=generator)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    return parameters_of(model)


Checks = list[Callable[[], None]]


def run(device: torch.device, checks: Checks) -> None:
    """Run several checks in one start of the ranks."""
    for check in checks:
        check()
