"""On GPUs: a training step never waits for the device. One rank has the hook's path, two have the kernels too."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp import (
    GAFState,
    Mean,
    NeighborhoodAgreement,
    SequentialAgreement,
    Weighting,
    gaf_hook,
    hook,
    skip_on_disagreement,
)
from gaf_ddp.rules.agreement import decide

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Ranks = Callable[..., list[Any]]

every_world = pytest.mark.parametrize("world_size", [1, 2])
SETTINGS: tuple[dict[str, Any], ...] = (
    {"tau": 0.9, "scope": "bucket"},
    {"tau": 0.9, "scope": "model"},
    {},
    {"watch": True},
)


def _train(
    device: torch.device, settings: dict[str, Any]
) -> tuple[DistributedDataParallel, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # world size 1 has nothing to filter, and says so
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device))
    state = GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if settings.get("scope") != "bucket":  # the exact skip without a sync; bucket scope has one
        skip_on_disagreement(optimizer, state)
    inputs = torch.randn(32, 64, device=device)
    for _ in range(3):  # buckets are rebuilt, kernels compiled
        _step(model, optimizer, inputs)
    torch.cuda.synchronize()
    return model, optimizer, inputs


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def _step_without_sync(device: torch.device, settings: dict[str, Any]) -> None:
    model, optimizer, inputs = _train(device, settings)
    try:
        torch.cuda.set_sync_debug_mode("error")
        _step(model, optimizer, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _device_to_host_copies(device: torch.device, settings: dict[str, Any]) -> list[str] | None:
    """Return what was copied but to pinned memory, None where the profiler may not look at the device."""
    model, optimizer, inputs = _train(device, settings)
    with torch.profiler.profile() as profile:
        _step(model, optimizer, inputs)
        torch.cuda.synchronize()
    events = profile.events()
    if not any(
        event.device_type == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        for event in events
    ):
        return None
    return [event.name for event in events if "Memcpy DtoH" in event.name and "Pinned" not in event.name]


@every_world
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_training_step_has_no_host_sync(nccl_ranks: Ranks, world_size: int, settings: dict[str, Any]) -> None:
    nccl_ranks(world_size, _step_without_sync, settings)


@every_world
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_training_step_copies_nothing_to_memory_that_the_host_would_wait_for(
    nccl_ranks: Ranks, world_size: int, settings: dict[str, Any]
) -> None:
    for copies in nccl_ranks(world_size, _device_to_host_copies, settings):
        if copies is None:
            pytest.skip("the profiler sees nothing of the device here")
        assert copies == []


def _correct_behind_a_busy_group(device: torch.device) -> tuple[list[bool], bool]:
    """Return which sums were corrected while the group's stream was still busy, and whether backward's waited."""
    model, _, inputs = _train(device, {})
    events: list[torch.cuda.Event] = []

    def correct(total: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        events.append(torch.cuda.Event())
        events[-1].record()
        return total

    hook.correct = correct  # type: ignore[attr-defined]
    side, busy = torch.cuda.Stream(device), torch.ones(1, device=device)
    loss = model(inputs).square().mean()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000_000)  # about a second
        work = dist.all_reduce(busy, async_op=True)  # the group's stream waits, and what is added up next behind it
    loss.backward()
    behind = torch.cuda.Event()
    behind.record()
    early = [event.query() for event in (*events, behind)]
    work.wait()
    torch.cuda.synchronize()
    return early[:-1], early[-1]


def test_sums_are_corrected_behind_the_all_reduce_and_backward_ends_behind_them(nccl_ranks: Ranks) -> None:
    for early, backward in nccl_ranks(1, _correct_behind_a_busy_group):
        assert early
        assert not any(early)
        assert not backward


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@pytest.mark.parametrize("world_size", [2, 8, 64, 1024])
@pytest.mark.parametrize("weighting", [Mean(), NeighborhoodAgreement(0.9), SequentialAgreement(0.9)], ids=repr)
def test_a_decision_has_no_host_sync(world_size: int, weighting: Weighting) -> None:
    gramian = torch.eye(world_size, device="cuda", dtype=torch.float64)
    decide(gramian, weighting, 10.0)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        decide(gramian, weighting, 10.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
