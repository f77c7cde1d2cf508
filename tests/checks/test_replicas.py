"""Replicas compared by their bits: who is named, and what happens in training."""

import pickle
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join

from gaf_ddp import GAFState, check_replicas, gaf_hook
from gaf_ddp.checks.replicas import differing
from tests.accelerator import take_accelerators_way
from tests.checks.faults import error_of, flip
from tests.nets import Probe, batches, ddp, mlp
from tests.syncs import HostSyncs

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([7, 7, 5, 7], "found others on rank 2 (c) than on most"),
        ([5, 7, 6, 7, 7], "found others on rank 0 (a) and rank 2 (c) than on most"),
        ([5, 7], "found no majority, but others on rank 0 (a) than on rank 1 (b)"),
        ([5, 7, 5, 7], "found no majority, but others on ranks 0 (a), 2 (c) than on ranks 1 (b), 3 (d)"),
        ([None, 7, 7, 5], "found others on rank 3 (d) than on most"),
    ],
    ids=str,
)
def test_the_fewer_are_named_and_all_sides_without_a_majority(values: list[int | None], said: str) -> None:
    assert differing(values, ["a 0", "b 1", "c", "d", "e"]) == said


def check_by_hand(device: torch.device) -> list[str]:
    """Return what checks say: of sound replicas, of a flipped bit on rank 1, of other states, of no majority."""
    model, rank = ddp(mlp(), device), dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters())
    ((inputs, labels),) = batches(rank, 1)
    torch.nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device)).backward()
    optimizer.step()
    check = lambda: check_replicas(model, optimizer)  # noqa: E731
    said = [error_of(check)]
    weight = next(model.parameters())
    before = weight.detach().clone()
    if rank == 1:
        with torch.no_grad():
            weight.copy_(flip(before.cpu(), 3, 0))
    said.append(error_of(check))
    with torch.no_grad():
        weight.copy_(before)
    if rank == 2:
        optimizer.state[weight]["exp_avg"][0, 0] += 1e-3
    said += [error_of(lambda: check_replicas(model)), error_of(check)]
    with torch.no_grad():
        weight[0, 0] = rank
    return [*said, error_of(lambda: check_replicas(model.module))]


def test_by_hand_names_the_rank_and_its_host(ranks: Ranks) -> None:
    host = socket.gethostname()
    rule = "parameters must be the same on every rank, found"
    for sound, flipped, forgotten, state, apart in ranks(3, check_by_hand):
        assert (sound, forgotten) == ("nothing", "nothing")
        assert flipped == f"{rule} others on rank 1 ({host}) than on most"
        assert state == (
            f"the optimizer's state must be the same on every rank, found others on rank 2 ({host}) than on most"
        )
        sides = " than on ".join(f"rank {rank} ({host})" for rank in range(3))
        assert apart == f"{rule} no majority, but others on {sides}"


def flip_in_training(device: torch.device, settings: dict[str, Any], on_accelerators_way: bool) -> dict[str, Any]:
    """Return when and how a bit that flips on rank 2 after step 5 is found, and what a check waited for."""
    model = ddp(Probe([300, 40]), device, bucket_cap_mb=0.0005)
    state = GAFState(check_every=4, **settings)
    if on_accelerators_way:
        take_accelerators_way()
        state._records.read = lambda limit, leave=0: None  # type: ignore[method-assign]  # which reads on the host
    waited: list[str] = []

    def hook(state: GAFState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        # In step 0 settings are compared, in step 8 the check before is read. Ballots are read on the host.
        quiet = 0 < state.step < 8 and state.tau is not None
        with HostSyncs() as syncs:
            future = gaf_hook(state, bucket)
        waited.extend(syncs.calls if quiet else [])
        return future

    model.register_comm_hook(state, hook if on_accelerators_way else gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        for _ in range(state.step, 10):
            optimizer.zero_grad()
            model(torch.ones(340, device=device)).backward()
            optimizer.step()
            if state.step == 5 and dist.get_rank() == 2:
                with torch.no_grad():
                    weight = model.module.parts[0]
                    weight.copy_(flip(weight.detach().cpu(), 7, 31))
        state.summary()

    return {"said": error_of(train), "steps": state.step, "waited": waited, "again": error_of(state.summary)}


@pytest.mark.parametrize("settings", [{}, {"tau": 1.0, "scope": "model"}], ids=str)
@pytest.mark.parametrize("on_accelerators_way", [False, True])
def test_check_every_names_rank_and_step(
    gloo_ranks: Ranks, settings: dict[str, Any], on_accelerators_way: bool
) -> None:
    for found in gloo_ranks(3, flip_in_training, settings, on_accelerators_way):
        rule = "check_every: parameters must be the same on every rank, at step 8 found others on rank 2"
        assert f"{rule} ({socket.gethostname()}) than on most" in found["said"]
        steps = 9 if not settings else 10 if on_accelerators_way else 8  # ballots say it a step later
        assert (found["steps"], found["waited"]) == (steps, [])
        assert found["again"] == "nothing"


def check_in_join(device: torch.device) -> int:
    """Train on unlike numbers of batches; return the steps, in which no check found anything."""
    model = ddp(Probe([50, 50]), device)
    state = GAFState(check_every=2)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([model]):
        for _ in range(3 + 5 * dist.get_rank()):
            optimizer.zero_grad()
            model(torch.ones(100, device=device)).backward()
            optimizer.step()
    check_replicas(model)
    return state.step


def test_ranks_that_have_joined_are_not_compared(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(3, check_in_join) == [13, 13, 13]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_check_every_must_be_a_count(value: Any) -> None:
    with pytest.raises(ValueError, match="check_every must be None or an integer >= 1, found"):
        GAFState(check_every=value)


def test_a_pickled_state_keeps_the_setting() -> None:
    restored = pickle.loads(pickle.dumps(GAFState(check_every=7)))
    assert restored.check_every == 7
