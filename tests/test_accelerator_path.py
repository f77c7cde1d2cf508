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
from tests.marks import job_but
from tests.nets import Probe, ddp, flat_parameters
from tests.syncs import HostSyncs

Ranks = Callable[..., list[Any]]

SIZES = [300, 11, 200]
TINY = {"bucket_cap_mb": 0.0005}  # two buckets

every_scope = pytest.mark.parametrize("scope", ["bucket", "model"])


def follow_without_streams(
    device: torch.device, gradients: Tensor, settings: dict[str, Any]
) -> tuple[Followed, list[str]]:
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
    return follow(device, gradients, SIZES, settings, TINY, hook), waited


@pytest.mark.parametrize("world_size", job_but(3, of=[2, 3, 7]))
@pytest.mark.parametrize("exchange", ["auto", "gather"])
@every_scope
def test_equals_the_oracle_without_a_host_sync(gloo_ranks: Ranks, world_size: int, exchange: str, scope: str) -> None:
    gradients = torch.stack([agreeing_gradients(world_size, sum(SIZES), seed) for seed in range(4)])
    gradients[1, 0] *= -1
    gradients[2, -1, 5] = torch.nan
    settings = {"tau": 0.9, "scope": scope, "exchange": exchange}
    outcomes = gloo_ranks(world_size, follow_without_streams, gradients, settings)
    assert_follows([followed for followed, _ in outcomes], gradients, oracle.neighborhood(0.9))
    assert [waited for _, waited in outcomes] == [[]] * world_size


def test_half_the_bytes_equal_the_oracle_too(gloo_ranks: Ranks) -> None:
    gradients = torch.stack([agreeing_gradients(3, sum(SIZES), seed) for seed in range(3)])
    outcomes = gloo_ranks(3, follow_without_streams, gradients, {"tau": 0.9, "wire_dtype": torch.bfloat16})
    assert_follows([followed for followed, _ in outcomes], gradients, oracle.neighborhood(0.9), tolerance=2e-2)
    assert [waited for _, waited in outcomes] == [[]] * 3


WRONG = ["tau on rank 1", "nan", "inf", "-0.5"]


def go_wrong(state: GAFState, how: str) -> None:
    """Let rank 1 decide by another tau, or all by weights that are none."""
    if how != "tau on rank 1":
        state.weighting = lambda gramian: torch.full_like(gramian[0], float(how))
    elif dist.get_rank() == 1:
        state.tau = 0.9


def go_right(state: GAFState) -> None:
    state.weighting, state.tau = None, 1.0


def error_of(call: Callable[[], object]) -> str:
    """Return what the call's ValueError says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "none"


def ask_summaries(device: torch.device, scope: str, how: str) -> list[str]:
    """Return what summaries say: after good steps, after one more that went wrong, and after more good ones."""
    model, state = ddp(Probe(SIZES), device, **TINY), GAFState(tau=1.0, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    said = []
    for steps, change in ((2, go_right), (1, lambda state: go_wrong(state, how)), (5, go_right)):
        change(state)
        for _ in range(steps):
            model(torch.ones(sum(SIZES), device=device)).backward()
        said.append(error_of(state.summary))
    return said


def ask_steps(device: torch.device, how: str) -> list[str]:
    """Return what an optimizer says that waits for the device: before and after going wrong."""
    probe = Probe(SIZES)
    model, state = ddp(probe, device, **TINY), GAFState(tau=1.0)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    skip_on_disagreement(optimizer, state)
    said = []
    for change in (go_right, lambda state: go_wrong(state, how)):
        change(state)
        model(torch.ones(sum(SIZES), device=device)).backward()
        before = flat_parameters(probe)
        said.append(error_of(optimizer.step))
    assert torch.equal(flat_parameters(probe), before)
    return said


def ask_the_next_backward(device: torch.device, how: str) -> list[str]:
    """Return what backwards say: the one that goes wrong, and the next, which reads its record."""
    model, state = ddp(Probe(SIZES), device, **TINY), GAFState(tau=1.0)
    model.register_comm_hook(state, gaf_hook)
    said = []
    for step in range(4):
        if step == 2:
            go_wrong(state, how)
        said.append(error_of(lambda: model(torch.ones(sum(SIZES), device=device)).backward()))
    return said


def ask(device: torch.device) -> list[list[str]]:
    take_accelerators_way()
    return [
        said
        for how in WRONG
        for said in (
            ask_summaries(device, "bucket", how),
            ask_summaries(device, "model", how),
            ask_steps(device, how),
            ask_the_next_backward(device, how),
        )
    ]


def test_what_goes_wrong_is_told_by_the_next_summary_skip_or_backward_and_not_before(gloo_ranks: Ranks) -> None:
    expected = []
    for how in WRONG:
        unlike = "settings and weights must be the same on every rank, found others than rank 0's on ranks 1"
        unsound = "weighting must return finite weights >= 0, found others in {}"
        by_bucket, by_model = [unlike if how == WRONG[0] else unsound.format(n) for n in ("2 decisions", "1 decision")]
        expected += [["none", by_bucket, "none"], ["none", by_model, "none"], ["none", by_bucket]]
        expected.append(["none", "none", "none", by_bucket])
    assert gloo_ranks(3, ask) == [expected] * 3
