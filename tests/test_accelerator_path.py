"""The way buckets take on accelerators, taken on the CPU: inside the hook, by collectives, without a host sync."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement
from tests import oracle
from tests.accelerator import take_accelerators_way
from tests.following import Followed, assert_follows, follow
from tests.gradients import agreeing_gradients
from tests.nets import Probe, ddp, flat_parameters
from tests.syncs import HostSyncs

Ranks = Callable[..., list[Any]]

SIZES = [300, 11, 200]
TINY = {"bucket_cap_mb": 0.0005}  # one bucket for each parameter

every_scope = pytest.mark.parametrize("scope", ["bucket", "model"])


def follow_without_streams(device: torch.device, *args: Any) -> tuple[Followed, list[str]]:
    """Return what `follow` saw on the accelerators' way, and what the hook waited for after step 0.

    In step 0 the ranks' settings are compared.
    """
    waited: list[str] = []

    def hook(state: GAFState, bucket: Any) -> torch.futures.Future[Tensor]:
        first_step = state.step == 0
        with HostSyncs() as syncs:
            future = gaf_hook(state, bucket)
        waited.extend([] if first_step else syncs.calls)
        return future

    take_accelerators_way()
    return follow(device, *args, hook), waited


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("exchange", ["auto", "gather"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@every_scope
def test_equals_the_oracle_without_a_host_sync(
    gloo_ranks: Ranks, world_size: int, exchange: str, momentum: float, scope: str
) -> None:
    gradients = torch.stack([agreeing_gradients(world_size, sum(SIZES), seed) for seed in range(4)])
    if not momentum:  # else the last gradients decide too
        gradients[1, 0] *= -1
        gradients[2, -1, 5] = torch.nan
    settings = {"tau": 0.9, "scope": scope, "exchange": exchange, "vote_momentum": momentum}
    outcomes = gloo_ranks(world_size, follow_without_streams, gradients, SIZES, settings, TINY)
    assert_follows([followed for followed, _ in outcomes], gradients, oracle.neighborhood(0.9))
    assert [waited for _, waited in outcomes] == [[]] * world_size


def test_half_the_bytes_equal_the_oracle_too(gloo_ranks: Ranks) -> None:
    gradients = torch.stack([agreeing_gradients(3, sum(SIZES), seed) for seed in range(2)])
    settings = {"tau": 0.9, "wire_dtype": torch.bfloat16}
    outcomes = gloo_ranks(3, follow_without_streams, gradients, SIZES, settings, TINY)
    assert_follows([followed for followed, _ in outcomes], gradients, oracle.neighborhood(0.9), tolerance=2e-2)
    assert [waited for _, waited in outcomes] == [[]] * 3


def constant(weight: float) -> Callable[[Tensor], Tensor]:
    return lambda gramian: torch.full_like(gramian[0], weight)


def go_wrong(device: torch.device, scope: str, how: str) -> list[str]:
    """Return what summaries say: after good steps, after one more that goes wrong, and after 70 more good ones."""
    take_accelerators_way()
    model, state = ddp(Probe(SIZES), device, **TINY), GAFState(tau=1.0, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)

    def steps(count: int) -> str:
        for _ in range(count):
            model(torch.ones(sum(SIZES), device=device)).backward()
        try:
            state.summary()
        except ValueError as error:
            return str(error)
        return "nothing"

    told = [steps(2)]
    if how != "tau on rank 1":
        state.weighting = constant(float(how))
    elif dist.get_rank() == 1:
        state.tau = 0.9
    told += [steps(1)]
    state.weighting, state.tau = None, 1.0
    return [*told, steps(70)]


UNLIKE = "settings must be the same on every rank, found others than rank 0's on [1]"
UNSOUND = "weighting must return finite weights >= 0, found others in {} decisions"


@every_scope
@pytest.mark.parametrize("how", ["tau on rank 1", "nan", "inf", "-0.5"])
def test_what_goes_wrong_is_told_by_the_next_summary_and_not_before(
    gloo_ranks: Ranks, scope: str, how: str
) -> None:
    message = UNLIKE if how == "tau on rank 1" else UNSOUND.format(3 if scope == "bucket" else 1)
    assert gloo_ranks(3, go_wrong, scope, how) == [["nothing", message, message]] * 3


def step_after_going_wrong(device: torch.device, how: str) -> str:
    """Return what an optimizer says whose step waits for the device, to be left out."""
    take_accelerators_way()
    probe = Probe(SIZES)
    model, state = ddp(probe, device, **TINY), GAFState(tau=1.0)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    skip_on_disagreement(optimizer, state)
    model(torch.ones(sum(SIZES), device=device)).backward()
    optimizer.step()
    if how != "tau on rank 1":
        state.weighting = constant(float(how))
    elif dist.get_rank() == 1:
        state.tau = 0.9
    model(torch.ones(sum(SIZES), device=device)).backward()
    before = flat_parameters(probe)
    try:
        optimizer.step()
    except ValueError as error:
        assert torch.equal(flat_parameters(probe), before)
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how", ["tau on rank 1", "nan", "-0.5"])
def test_what_goes_wrong_is_told_by_a_skip(gloo_ranks: Ranks, how: str) -> None:
    message = UNLIKE if how == "tau on rank 1" else UNSOUND.format(3)
    assert gloo_ranks(3, step_after_going_wrong, how) == [message] * 3
