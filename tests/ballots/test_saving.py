"""What the late way remembers: saved and loaded, it decides on to the bit; at another world size it begins anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, gaf_hook
from tests.ballots.training import SIZES, TINY, N
from tests.gradients import agreeing_gradients
from tests.nets import Probe, ddp, flat_gradients

Ranks = Callable[..., list[Any]]


def spoilt(step: int, world_size: int) -> Tensor:
    gradients = agreeing_gradients(world_size, N, step)
    gradients[1] *= -1 if step < 8 else 1
    return gradients


def train(device: torch.device, path: Path, resume: bool, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return z and gradients of steps 6 to 11; go on from the state that was saved after step 5 if asked to."""
    probe = Probe(SIZES)
    model, state = ddp(probe, device, **TINY), GAFState()
    model.register_comm_hook(state, gaf_hook)
    if resume:
        state.load_state_dict(torch.load(path / "state.pt", weights_only=True))
    seen = []
    for step in range(6 if resume else 0, 12):
        probe.zero_grad()
        model(spoilt(step, world_size)[dist.get_rank()]).backward()
        if step >= 6:
            assert state.agreement is not None
            assert state.agreement.distance is not None
            seen.append((state.agreement.distance, flat_gradients(probe)))
        if step == 5 and dist.get_rank() == 0:
            torch.save(state.state_dict(), path / "state.pt")
    assert state.step == 12
    return seen


def test_a_resumed_run_decides_as_an_undisturbed_one(gloo_ranks: Ranks, tmp_path: Path) -> None:
    whole, resumed = (gloo_ranks(4, train, tmp_path, resume, 4) for resume in (False, True))
    for undisturbed, again in zip(whole[0], resumed[0], strict=True):
        # DDP's first step has another layout of buckets: sums of the same numbers in another order.
        torch.testing.assert_close(again[0], undisturbed[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(again[1], undisturbed[1], rtol=1e-6, atol=1e-6)


def test_another_world_size_begins_anew(gloo_ranks: Ranks, tmp_path: Path) -> None:
    gloo_ranks(4, train, tmp_path, False, 4)
    for seen in gloo_ranks(3, train, tmp_path, True, 3):
        expected = spoilt(6, 3).double().mean(0)  # everybody counts at first
        torch.testing.assert_close(seen[0][1], expected, rtol=1e-5, atol=1e-5)


def load_while_training(device: torch.device, path: Path) -> list[bool]:
    """Return who counts in the step after a state has been loaded into one that trains."""
    probe = Probe(SIZES)
    model, state = ddp(probe, device, **TINY), GAFState()
    model.register_comm_hook(state, gaf_hook)
    model(agreeing_gradients(4, N, 0)[dist.get_rank()]).backward()
    state.load_state_dict(torch.load(path / "state.pt", weights_only=True))
    probe.zero_grad()
    gradients = agreeing_gradients(4, N, 6)
    model(gradients[dist.get_rank()]).backward()
    found = flat_gradients(probe)
    return [
        bool(torch.allclose(found, gradients[kept].double().mean(0), atol=1e-5)) for kept in ([0, 2, 3], [0, 1, 2, 3])
    ]


def test_a_loaded_verdict_holds_at_once(gloo_ranks: Ranks, tmp_path: Path) -> None:
    gloo_ranks(4, train, tmp_path, False, 4)
    assert gloo_ranks(4, load_while_training, tmp_path) == [[True, False]] * 4


@pytest.mark.parametrize("memory", [b"", b"PK" * 50])
def test_a_memory_that_is_none_is_refused(memory: bytes) -> None:
    state = GAFState()
    with pytest.raises(ValueError, match=r"memory must be what state_dict\(\) returned, found b"):
        state.load_state_dict({**state.state_dict(), "memory": memory})
