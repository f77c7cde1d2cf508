"""attach under Accelerate: to the bit what a loop on DDP does, and resumes as if it had not been disturbed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, attach
from tests.frameworks.by_hand import QUIET, RULES, STEPS, as_torchrun, assert_same_state, by_hand, loss_of, sgd
from tests.nets import batches, flat_parameters, mlp

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def train(settings: dict[str, Any], folder: str, stop: int | None = None, resume: bool = False) -> Any:
    """Return parameters and state after README's lines for Accelerate; save at a stop, or go on from one."""
    accelerator = accelerate.Accelerator(cpu=True)
    module = mlp()
    model, optimizer = accelerator.prepare(module, sgd(module))
    state = attach(model, optimizer, **settings)
    accelerator.register_for_checkpointing(state)
    if resume:
        accelerator.load_state(folder)
    for inputs, targets in batches(dist.get_rank(), STEPS)[state.step : stop]:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model(inputs), targets))
        optimizer.step()
    if stop:
        accelerator.save_state(folder)
    return flat_parameters(module), state


def body(device: torch.device, folder: str) -> None:
    as_torchrun()
    for number, settings in enumerate(RULES):
        expected: Tensor = by_hand(device, settings)
        whole: GAFState
        parameters, whole = train(settings, folder)
        assert torch.equal(parameters, expected)
        path = str(Path(folder, str(number)))
        stopped, first = train(settings, path, stop=STEPS // 2)
        assert (first.step, torch.equal(stopped, expected)) == (STEPS // 2, False)
        resumed, second = train(settings, path, resume=True)
        assert torch.equal(resumed, expected)
        assert_same_state(second, whole)


def test_equals_the_loop_and_resumes(gloo_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    gloo_ranks(2, body, str(tmp_path))
