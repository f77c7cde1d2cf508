"""The way buckets take on accelerators, taken on the CPU: inside the hook, by collectives, without a host sync.

What is left out is what the CPU does not have: streams, and Triton's kernels (test_triton.py, test_cuda.py).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import _few_ranks, exchange, gaf_hook, gramian, state
from gaf_ddp.overlap import Promise, StreamLane
from tests import following, oracle
from tests.following import Followed, assert_follows
from tests.gradients import agreeing_gradients
from tests.syncs import HostSyncs

Ranks = Callable[..., list[Any]]

SIZES = [300, 11, 200]
TINY = {"bucket_cap_mb": 0.0005}  # one bucket for each parameter


class NoStream(StreamLane):
    """A lane as accelerators have it, on a device without streams."""

    def __init__(self, parent: dist.ProcessGroup, device: torch.device) -> None:
        self.group = self.small_messages = parent

    def promise(self) -> Promise:
        return Promise()

    def run(self, work: Callable[[], None], awaited: bool = True) -> None:
        with torch.no_grad():
            work()


class Collectives(exchange.ShardedExchange):
    """What accelerators use, in the place of what the CPU uses."""

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None, small: Any) -> None:
        super().__init__(group, wire_dtype)


def follow(device: torch.device, *args: Any) -> tuple[Followed, list[str]]:
    """Return what `following.follow` saw on the accelerators' way, and what the hook waited for after step 0.

    In step 0 the ranks' settings are compared.
    """
    waited: list[str] = []

    def hook(now: state.GAFState, bucket: Any) -> torch.futures.Future[Tensor]:
        first_step = now.step == 0
        with HostSyncs() as syncs:
            future = gaf_hook(now, bucket)
        waited.extend([] if first_step else syncs.calls)
        return future

    # This process is the rank's own and ends with it.
    state.open_lane = NoStream  # type: ignore[assignment]
    exchange.PeerExchange = Collectives  # type: ignore[misc,assignment]
    gramian._DOT_ROWS = 0
    gramian._combine_on_cpu = gramian._combine_on_accelerator
    _few_ranks.can_decide = lambda *args: False  # type: ignore[assignment]
    following.gaf_hook = hook
    return following.follow(device, *args), waited


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("how", ["auto", "gather"])
@pytest.mark.parametrize("scope", ["bucket", "model"])
def test_equals_the_oracle_without_a_host_sync(gloo_ranks: Ranks, world_size: int, how: str, scope: str) -> None:
    gradients = torch.stack([agreeing_gradients(world_size, sum(SIZES), seed) for seed in range(4)])
    gradients[1, 0] *= -1
    gradients[2, -1, 5] = torch.nan
    outcomes = gloo_ranks(
        world_size, follow, gradients, SIZES, {"tau": 0.9, "scope": scope, "exchange": how}, TINY
    )
    assert_follows([followed for followed, _ in outcomes], gradients, oracle.neighborhood(0.9))
    assert [waited for _, waited in outcomes] == [[]] * world_size


def test_half_the_bytes_equal_the_oracle_too(gloo_ranks: Ranks) -> None:
    gradients = torch.stack([agreeing_gradients(3, sum(SIZES), seed) for seed in range(2)])
    outcomes = gloo_ranks(3, follow, gradients, SIZES, {"tau": 0.9, "wire_dtype": torch.bfloat16}, TINY)
    assert_follows([followed for followed, _ in outcomes], gradients, oracle.neighborhood(0.9), tolerance=2e-2)
    assert [waited for _, waited in outcomes] == [[]] * 3
