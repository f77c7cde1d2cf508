"""The hook's group is DDP's: another is an error at the first bucket, and a part of the world filters alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from gaf_ddp import GAFState, gaf_hook
from tests.nets import Probe, assert_replicas_equal, ddp, flat_gradients

Ranks = Callable[..., list[Any]]

N = 40


def halves() -> list[Any]:
    """Return the groups of ranks 0 and 1, and of 2 and 3."""
    return [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]


def backward(model: nn.Module, gradient: Tensor) -> str:
    """Return what a ValueError of the backward says."""
    try:
        model(gradient).backward()
    except ValueError as error:
        return str(error)
    return "nothing"


def train_over_another_group(device: torch.device, settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what backwards say where DDP's group is half of the hook's and twice that, and both names."""
    mine = halves()[dist.get_rank() // 2]
    gradient = torch.ones(N, device=device)
    told = []
    for ours, theirs in ((None, mine), (mine, None)):
        model = ddp(Probe([N]), device, process_group=theirs)
        model.register_comm_hook(GAFState(ours, **settings), gaf_hook)
        told += [backward(model, gradient)]
    world = dist.group.WORLD
    assert world is not None
    return told, [world.group_name, mine.group_name]


def test_another_group_is_refused_by_both_names(ranks: Ranks) -> None:
    for rank, (told, (world, mine)) in enumerate(ranks(4, train_over_another_group, {"tau": 1.0})):
        part = [0, 1] if rank < 2 else [2, 3]
        rule, everyone = "process_group must be the model's own, found", [0, 1, 2, 3]
        assert told == [
            f"{rule} '{world}' of ranks {everyone} beside the model's '{mine}' of ranks {part}",
            f"{rule} '{mine}' of ranks {part} beside the model's '{world}' of ranks {everyone}",
        ]


def filter_in_halves(device: torch.device) -> None:
    """Let rank 3 alone turn its gradient: its half finds no agreement, the other one does not notice."""
    rank, mine = dist.get_rank(), halves()[dist.get_rank() // 2]
    scopes: list[Any] = ["bucket", "model"]
    for scope in scopes:
        probe, state = Probe([N]), GAFState(mine, tau=0.5, scope=scope)
        model = ddp(probe, device, process_group=mine)
        model.register_comm_hook(state, gaf_hook)
        model((-1.0 if rank == 3 else 1.0) * torch.ones(N, device=device)).backward()
        assert flat_gradients(probe).tolist() == [1.0 if rank < 2 else 0.0] * N
        assert state.agreement is not None
        assert state.agreement.kept.numel() == 2
        assert_replicas_equal(probe, mine)


def test_a_part_of_the_world_filters_alone(ranks: Ranks) -> None:
    ranks(4, filter_in_halves)


def train_over_a_mesh(device: torch.device) -> None:
    """Build DDP from one dimension of a device mesh, and the state from its group."""
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replica", "data"))
    probe, group = Probe([N]), mesh["data"].get_group()
    model = ddp(probe, device, device_mesh=mesh["data"])
    model.register_comm_hook(GAFState(group, tau=2.0), gaf_hook)
    model(torch.full((N,), 1.0 + dist.get_rank(), device=device)).backward()
    assert flat_gradients(probe).tolist() == [1.5 if dist.get_rank() < 2 else 3.5] * N


def test_a_model_over_a_device_mesh(ranks: Ranks) -> None:
    ranks(4, train_over_a_mesh)
