"""What the tests of frameworks share: a loop written by hand, and a rank that looks as torchrun starts it."""

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement
from tests.nets import batches, ddp, flat_parameters, mlp

# The rules that every framework is tried with; by the second one some steps are left out.
RULES: list[dict[str, Any]] = [{}, {"tau": 0.8, "scope": "model"}]
STEPS = 8

# Frameworks warn of many things, of each other's releases too; ours are errors in CI.
QUIET = ["ignore", "error:gaf_ddp", "error:::gaf_ddp"]


def as_torchrun() -> None:
    """Give this rank the environment of torchrun, and leave other packages' warnings alone."""
    size, rank = str(dist.get_world_size()), str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="gaf_ddp")
    warnings.filterwarnings("error", module="gaf_ddp")
    warnings.filterwarnings("ignore", message="gaf_ddp: world size 2,")


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def sgd(module: nn.Module) -> SGD:
    """Return an optimizer that moves on zero gradients too, so that only an exact skip stands still."""
    return SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def by_hand(device: torch.device, settings: dict[str, Any], steps: int = STEPS) -> Tensor:
    """Return the parameters after a loop on plain DDP, with the calls that attach and the callbacks stand for."""
    module = mlp()
    model = ddp(module, device)
    state, optimizer = GAFState(**settings), sgd(module)
    model.register_comm_hook(state, gaf_hook)
    skip_on_disagreement(optimizer, state)
    for inputs, targets in batches(dist.get_rank(), steps):
        optimizer.zero_grad()
        loss_of(model(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()
    skipped = state.summary()["gaf/skipped_fraction"]
    assert 0 < skipped < 1 if "tau" in settings else skipped == 0
    return flat_parameters(module)


def assert_same_state(state: GAFState, expected: GAFState) -> None:
    """Assert equal steps and how often each rank was kept.

    Not the momenta's bits: a resumed job's first step has other buckets, whose sums round otherwise.
    """
    found, wanted = state.state_dict(), expected.state_dict()
    assert (found["step"], found["totals"]["kept"]) == (wanted["step"], wanted["totals"]["kept"])
