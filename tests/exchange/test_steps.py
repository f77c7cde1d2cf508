"""Steps under DDP: many buckets in order, clean ends, and groups that come and go."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp import GAFState, gaf_hook
from tests.marks import job_but
from tests.nets import assert_replicas_equal, batches, ddp, mlp
from tools.ranks import RankError

Ranks = Callable[..., list[Any]]

every_scope = pytest.mark.parametrize("scope", ["bucket", "model", "late"])


def make_state(scope: str) -> GAFState:
    """Return a state that filters by tau in this scope, or judges one step late, or only watches."""
    if scope == "watching":
        return GAFState(watch=True, check_every=1)
    return GAFState() if scope == "late" else GAFState(tau=1.0, scope=scope)  # type: ignore[arg-type]


class Detours(nn.Module):
    """Many small layers, some of which every step leaves out, each rank others; under DDP a bucket each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(6))

    def forward(self, x: Tensor, left_out: set[int]) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i not in left_out:
                x = layer(x).tanh()
        return x


def train_with_delays(device: torch.device, steps: int, scope: str) -> tuple[int, int]:
    """Take steps in which each rank computes for random times between its buckets; return steps and buckets."""
    torch.manual_seed(0)
    model = ddp(Detours(), device, find_unused_parameters=True, bucket_cap_mb=0.0005)
    state = make_state(scope)
    model.register_comm_hook(state, gaf_hook)
    chance = random.Random(dist.get_rank())
    for p in model.parameters():  # backward computes for a while
        p.register_post_accumulate_grad_hook(lambda p: time.sleep(chance.uniform(0, 0.003)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(dist.get_rank())).to(device)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, set(chance.sample(range(6), 2))).square().sum().backward()
        optimizer.step()
    assert_replicas_equal(model)
    assert state.agreement is not None
    return state.step, len(state.agreement.kept) if scope == "bucket" else len(state.decisions[0].parameters)


DELAYED = [(150, "bucket"), (50, "model"), (50, "late"), (50, "watching")]


@pytest.mark.parametrize(("steps", "scope"), job_but((50, "model"), of=DELAYED))
def test_many_steps_of_many_buckets_with_delays(ranks: Ranks, steps: int, scope: str) -> None:
    assert ranks(4, train_with_delays, steps, scope) == [(steps, 6)] * 4


def train(module: nn.Module, state: GAFState, device: torch.device, steps: int) -> None:
    model = ddp(module, device, bucket_cap_mb=0.001)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, labels in batches(dist.get_rank(), steps):
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
    assert_replicas_equal(module)


def new_default_group(store: Path) -> None:
    """Destroy the default group and make it again, with another file store."""
    backend, rank, world_size = dist.get_backend(), dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)


def train_in_two_groups(device: torch.device, folder: Path, scope: str) -> int:
    """Train, destroy the group, make another in the same process, and go on with the same state; return its steps."""
    state, module = make_state(scope), mlp()
    train(module, state, device, 3)
    new_default_group(folder / "second")
    train(module, state, device, 3)
    dist.destroy_process_group()
    return state.step


@every_scope
def test_the_state_goes_on_in_a_new_group(ranks: Ranks, tmp_path: Path, scope: str) -> None:
    # That the group can be destroyed and the processes exit with code 0 is what every test with ranks asserts.
    assert ranks(2, train_in_two_groups, tmp_path, scope) == [6, 6]


class BackwardError(Exception):
    """What a user's own code raises in backward."""


def break_off(device: torch.device, folder: Path, scope: str) -> tuple[int, int, int]:
    """Break the third backward off on all ranks after its first bucket; go on with the state in a new group."""
    state, module = make_state(scope), mlp()
    (first, *_), calls = list(module.parameters()), []

    def fail(p: Tensor) -> None:
        calls.append(p)
        if len(calls) == 3:
            raise BackwardError

    handle = first.register_post_accumulate_grad_hook(fail)  # the last to get its gradient
    with pytest.raises(BackwardError):
        train(module, state, device, 3)
    handle.remove()
    new_default_group(folder / "second")
    train(module, state, device, 1)
    parameters = sum(len(decision.parameters) for decision in state.decisions)
    return state.step, parameters, len(list(module.parameters()))


@every_scope
def test_a_step_broken_off_leaves_nothing_behind(gloo_ranks: Ranks, tmp_path: Path, scope: str) -> None:
    for steps, decided, parameters in gloo_ranks(2, break_off, tmp_path, scope):
        assert steps == 3
        assert decided == parameters


def lose_rank_1(device: torch.device) -> None:
    """Let rank 1 end before it ever met the others, who are told so, and in time."""
    model = ddp(mlp(), device)
    model.register_comm_hook(GAFState(tau=1.0), gaf_hook)
    if dist.get_rank() == 1:
        os._exit(3)
    start = time.monotonic()
    said = r"gaf_ddp: before the first bucket \(is the hook on every rank\?\): rank 0 lost rank 1: "
    with pytest.raises(RuntimeError, match=said):
        model(torch.ones(3, 12)).sum().backward()
    assert time.monotonic() - start < 30  # of the group's 60


def test_a_rank_that_ended_before_the_first_bucket_is_named(gloo_ranks: Ranks) -> None:
    with pytest.raises(RankError) as error:
        gloo_ranks(2, lose_rank_1)
    assert error.value.failures == {1: "died with exit code 3"}


RAISE = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from gaf_ddp import GAFState, gaf_hook

rank, folder, where = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

def weighting(gramian):
    if where == "in the hook" and rank == 1 and state.step == 2:
        fail()
    return torch.full((2,), 0.5)

def fail(*_):
    open(f"{folder}/raised", "w").close()
    raise LookupError("not today")

module, state = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), GAFState(weighting=weighting)
model = DistributedDataParallel(module, bucket_cap_mb=0.0001)
model.register_comm_hook(state, gaf_hook)
for _ in range(2):
    model(torch.ones(2, 9)).sum().backward()
if where == "between buckets" and rank == 1:
    module[0].weight.register_post_accumulate_grad_hook(fail)
model(torch.ones(2, 9)).sum().backward()
"""


@pytest.mark.job
@pytest.mark.ranks
@pytest.mark.parametrize("where", ["in the hook", "between buckets"])
def test_a_rank_that_raised_ends_at_once_and_the_other_is_told(tmp_path: Path, where: str) -> None:
    command = [sys.executable, "-c", RAISE]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path), where], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        told, raised = [process.communicate(timeout=90)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [1, 1]
        assert time.time() - (tmp_path / "raised").stat().st_mtime < 15  # of the group's half an hour
        assert "LookupError: not today" in raised
        assert re.search(r"RuntimeError: gaf_ddp: step 2, bucket \d: ", told)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
