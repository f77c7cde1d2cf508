"""Models for tests of the hook."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Probe(nn.Module):
    """Parameters that get the gradients a test wants: those of `probe(g)` are g `(N,)`, to the bit.

    Args:
        sizes: number of elements of each parameter.
        dtypes: of each parameter; all float32 if None.
    """

    def __init__(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ParameterList(
            nn.Parameter(torch.randn(size, generator=generator).to(dtype))
            for size, dtype in zip(sizes, dtypes or [torch.float32] * len(sizes), strict=True)
        )

    def forward(self, gradients: Tensor) -> Tensor:
        slices = torch.split(gradients, [p.numel() for p in self.parts])
        losses = [(p * g.to(p.dtype)).sum() for p, g in zip(self.parts, slices, strict=True)]
        return torch.stack([loss.to(losses[0].dtype) for loss in losses]).sum()


def flat_gradients(module: nn.Module) -> Tensor:
    """Return the gradients of all parameters as one vector `(N,)` in float64."""
    return torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])


def flat_parameters(module: nn.Module) -> Tensor:
    """Return all parameters as one vector `(N,)` in float64."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def assert_replicas_equal(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Assert that every rank of the group has the same bits in every parameter."""
    own = torch.cat([p.detach().contiguous().view(-1).view(torch.uint8) for p in module.parameters()])
    first = own.clone()
    dist.broadcast(first, group=group, group_src=0)
    assert torch.equal(own, first), "this rank's parameters differ from rank 0's"


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a network of several layers, the same for the same seed: in to (., 12), out (., 5)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5)
    ).to(dtype)


def batches(rank: int, steps: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's inputs `(size, 12)` and labels `(size,)` of each step."""
    generator = torch.Generator().manual_seed(1000 + rank)
    return [
        (torch.randn(size, 12, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(steps)
    ]


def world() -> dist.ProcessGroup:
    """Return the default group."""
    group = dist.group.WORLD
    assert group is not None
    return group


def ddp(module: nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    """Return the module on the device under DDP."""
    return DistributedDataParallel(module.to(device), **options)
