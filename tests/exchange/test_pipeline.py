"""The way of a bucket: which exchange it takes, and what it may not be."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.ballots.late import LateFilter
from gaf_ddp.connect import meet
from gaf_ddp.exchange.gather import GatherExchange
from gaf_ddp.exchange.pipeline import Pipeline
from gaf_ddp.exchange.sharded import ShardedExchange
from gaf_ddp.exchange.sketched import SketchExchange
from tests.accelerator import take_accelerators_way
from tests.nets import Probe, ddp, world

Ranks = Callable[..., list[Any]]

SMALL, LARGE = 40, 100_000
SETTINGS: list[dict[str, Any]] = [
    {"tau": 1.0, "scope": "bucket"},
    {"tau": 1.0, "scope": "model"},
    *({"tau": 1.0, "scope": s, "exchange": e} for s in ("bucket", "model") for e in ("gather", "sharded", "sketch")),
]


def watch_routes(device: torch.device, as_accelerator: bool) -> list[list[str]]:
    """Return for each of SETTINGS which exchange a small and a large bucket took."""
    if as_accelerator:
        take_accelerators_way()
    taken: dict[int, str] = {}

    def watch(kind: Any) -> None:
        scatter = kind.scatter

        def watched(exchange: Any, bucket: Tensor) -> Any:
            taken[bucket.numel()] = kind.__name__
            return scatter(exchange, bucket)

        kind.scatter = watched  # in a rank's process, which ends with the test

    for kind in (GatherExchange, ShardedExchange, SketchExchange):
        watch(kind)
    found = []
    for settings in SETTINGS:
        taken.clear()
        model = ddp(Probe([LARGE, SMALL]), device, bucket_cap_mb=0.0001)
        model.register_comm_hook(GAFState(**settings), gaf_hook)
        for _ in range(2):  # DDP's first step has one bucket
            model(torch.ones(LARGE + SMALL, device=device)).backward()
        found.append([taken[SMALL], taken[LARGE]])
    return found


def routes(small_in_bucket_scope: str) -> list[list[str]]:
    """Return what `watch_routes` should."""
    gather, shard, sketch = ([name] * 2 for name in ("GatherExchange", "ShardedExchange", "SketchExchange"))
    exact = [gather, shard, sketch]
    return [[small_in_bucket_scope, "ShardedExchange"], shard, *exact, *exact]


def test_on_the_cpu_auto_never_gathers(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(2, watch_routes, False) == [routes("ShardedExchange")] * 2


ON_ACCELERATORS = [routes("GatherExchange")] * 2


def test_on_accelerators_auto_gathers_small_buckets_in_bucket_scope(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(2, watch_routes, True) == ON_ACCELERATORS


def test_gpus_do_so_too(nccl_ranks: Ranks) -> None:
    assert nccl_ranks(2, watch_routes, False) == ON_ACCELERATORS


ONE_DEVICE = r"all parameters .* must be on one device, found .* and meta"


def take_from_two_devices(device: torch.device) -> None:
    """Let a bucket come from another device than the first one; one without memory stands for it."""
    pipeline = Pipeline(GAFState(tau=1.0), world(), device)
    with pytest.raises(ValueError, match=ONE_DEVICE):
        pipeline.take(SimpleNamespace(buffer=lambda: torch.zeros(4, device="meta")))
    meet(state := GAFState(), world(), device)
    late = LateFilter(state, world(), device)
    late.begin()
    with pytest.raises(ValueError, match=ONE_DEVICE):
        late.weigh(torch.zeros(4, device="meta"), [torch.nn.Parameter(torch.zeros(4, device="meta"))])


def test_a_model_on_two_devices_is_refused(ranks: Ranks) -> None:
    ranks(2, take_from_two_devices)
