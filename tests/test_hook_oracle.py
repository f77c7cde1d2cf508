"""gaf_hook under DDP against the oracle: every rule, scope, exchange and world size, and spoilt ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gaf_ddp import NeighborhoodAgreement, SequentialAgreement
from tests import oracle
from tests.following import Followed, assert_follows, follow
from tests.gradients import random_gradients
from tests.marks import job_but

Ranks = Callable[..., list[Any]]

SIZES = [700, 1, 40, 1300, 3, 900, 600, 5, 31, 2000]
MANY_BUCKETS = {"bucket_cap_mb": 0.0001}  # seven, one of them of a few elements
FEW_BUCKETS = {"bucket_cap_mb": 0.01}
ONE_BUCKET: dict[str, Any] = {}

CASES = [
    (NeighborhoodAgreement(0.97), oracle.neighborhood(0.97), MANY_BUCKETS),
    (SequentialAgreement(0.97), oracle.sequential(0.97), FEW_BUCKETS),
    (SequentialAgreement(0.97, running="half"), oracle.sequential(0.97, "half"), ONE_BUCKET),
]

every_scope = pytest.mark.parametrize("scope", ["bucket", "model"])


def some_steps(world_size: int) -> Tensor:
    """Return gradients `(steps, W, N)`: two as they come, one each with a zero, NaN and overlong rank."""
    steps = torch.stack([random_gradients(world_size, sum(SIZES), seed=10 * world_size + s) for s in range(5)])
    steps[2, 0] = 0
    steps[3, -1, ::7] = torch.nan
    if world_size > 2:  # of two ranks the shorter is the median
        steps[4, world_size // 2] *= 1000
    return steps


def follow_all(device: torch.device, gradients: Tensor, settings: dict[str, Any]) -> list[Followed]:
    return [
        follow(device, gradients, SIZES, {"weighting": weighting, **settings}, options)
        for weighting, _, options in CASES
    ]


@pytest.mark.parametrize("exchange", ["sharded", "gather"])
@every_scope
@pytest.mark.parametrize("world_size", job_but(3, of=[1, 2, 3, 4, 7]))
def test_the_hook_equals_the_oracle(ranks: Ranks, world_size: int, scope: str, exchange: str) -> None:
    gradients = some_steps(world_size)
    outcomes = ranks(world_size, follow_all, gradients, {"scope": scope, "exchange": exchange})
    for i, (_, rule, options) in enumerate(CASES):
        assert_follows([outcome[i] for outcome in outcomes], gradients, rule)
        if scope == "bucket" and options is MANY_BUCKETS:
            assert len(outcomes[0][i].spans[-1]) > 5


@every_scope
def test_buckets_may_travel_unlike_ways(ranks: Ranks, scope: str) -> None:
    # In bucket scope "auto" gathers the small buckets on accelerators, and shards the large one.
    sizes = [30_000, 10, 10]
    gradients = torch.stack([random_gradients(3, sum(sizes), seed=s) for s in range(3)])
    settings = {"weighting": NeighborhoodAgreement(0.97), "scope": scope, "exchange": "auto"}
    outcomes = ranks(3, follow, gradients, sizes, settings, {"bucket_cap_mb": 0.0001})
    assert_follows(outcomes, gradients, oracle.neighborhood(0.97))


WIRES = [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)]


@every_scope
@pytest.mark.parametrize(("wire", "tolerance"), job_but(WIRES[0], of=WIRES))
def test_gradients_may_travel_in_half_precision(ranks: Ranks, scope: str, wire: torch.dtype, tolerance: float) -> None:
    # The tolerance is twice the dtype's unit: gradients are rounded before they are sent, and the result once.
    gradients = some_steps(3)
    for exchange in ("sharded", "gather"):
        settings = {"tau": 2.0, "scope": scope, "exchange": exchange, "wire_dtype": wire}
        outcomes = ranks(3, follow, gradients, SIZES, settings, FEW_BUCKETS)
        assert_follows(outcomes, gradients, oracle.mean, tolerance=tolerance)
        if exchange == "sharded":  # the result travels too
            found = outcomes[0].gradients
            assert torch.equal(found.to(wire).double(), found)


def test_no_norm_guard_keeps_what_is_long(ranks: Ranks) -> None:
    gradients = some_steps(4)
    outcomes = ranks(4, follow, gradients, SIZES, {"tau": 2.0, "max_norm_ratio": None}, FEW_BUCKETS)
    assert_follows(outcomes, gradients, oracle.mean, max_norm_ratio=None)
    assert outcomes[0].summary["gaf/overlong_fraction"] == 0
