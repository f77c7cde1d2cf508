"""Steps with given gradients under DDP and the late hook."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.ballots.late import LateFilter
from tests.nets import Probe, assert_replicas_equal, ddp, flat_gradients

SIZES = [300, 11, 200]
N = sum(SIZES)
TINY = {"bucket_cap_mb": 0.0005}  # two buckets after the first step, which has one


class Trained(NamedTuple):
    """What one rank saw in each step."""

    gradients: Tensor  # (steps, N) float64, after the hook
    kept: Tensor  # (steps, W) bool, who counts from the next step on
    z: Tensor  # (steps, W) float64
    summary: dict[str, float]
    limits: list[dict[str, float]]  # of each step's buckets, by the sizes of their parameters


def train(
    device: torch.device,
    gradients: Tensor,
    settings: dict[str, Any],
    options: dict[str, Any] = TINY,
    each_step: Callable[[GAFState, int], None] | None = None,
) -> Trained:
    """Take SGD steps whose gradients `(steps, W, N)` are given; replicas must have the same bits after each."""
    probe = Probe(SIZES).to(device)
    model, state = ddp(probe, device, **options), GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    limits = []
    for step, of_ranks in enumerate(gradients):
        if each_step is not None:
            each_step(state, step)
        optimizer.zero_grad()
        model(of_ranks[dist.get_rank()].to(device)).backward()
        assert state.step == step + 1
        filtered = flat_gradients(probe).cpu()
        if not filtered.isnan().any():
            optimizer.step()
            assert_replicas_equal(probe)
        agreement = state.agreement
        if agreement is None:  # no ballot is full yet
            nothing = torch.full((dist.get_world_size(),), torch.nan, dtype=torch.float64)
            seen.append((filtered, torch.ones_like(nothing, dtype=torch.bool), nothing))
        else:
            assert agreement.distance is not None
            seen.append((filtered, agreement.kept, agreement.distance))
        assert isinstance(state._way, LateFilter)
        sizes = {id(parameter): str(parameter.numel()) for parameter in probe.parts}
        limits.append(
            {"+".join(sizes[i] for i in key): each[0].item() for key, each in state._way.share.limits._on_host.items()}
        )
    columns = [torch.stack(column) for column in zip(*seen, strict=True)]
    return Trained(columns[0], columns[1], columns[2], state.summary(), limits)


def averaged(
    device: torch.device, gradients: Tensor, options: dict[str, Any] = TINY, hook: Any = allreduce_hook
) -> Tensor:
    """Return what torch's own hook makes of the same gradients, `(steps, N)` float64."""
    probe = Probe(SIZES).to(device)
    model = ddp(probe, device, **options)
    model.register_comm_hook(None, hook)
    found = []
    for of_ranks in gradients:
        probe.zero_grad()
        model(of_ranks[dist.get_rank()].to(device)).backward()
        found.append(flat_gradients(probe).cpu())
    return torch.stack(found)


def both(device: torch.device, gradients: Tensor, settings: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    """Return what the late hook and torch's own make of the same gradients."""
    return [train(device, gradients, settings, options), averaged(device, gradients, options)]
