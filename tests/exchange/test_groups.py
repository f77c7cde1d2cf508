"""The groups of a lane's own go with it, once it is gone on every rank."""

import gc
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.exchange.groups import CAN_CLOSE
from gaf_ddp.exchange.lanes import open_lane
from gaf_ddp.exchange.thread import ThreadLane
from tests.nets import Probe, ddp, world

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.ranks


def halves() -> list[Any]:
    """Return the groups of even and of odd ranks."""
    return [dist.new_group(ranks, timeout=timedelta(seconds=17)) for ranks in ([0, 2], [1, 3])]


def open_sibling(device: torch.device) -> tuple[float, bool, list[int]]:
    """Return the time-out, whether it is another group, and the ranks of a lane over the ranks of this parity."""
    parent = halves()[dist.get_rank() % 2]
    lane = open_lane(parent, device, None, 64)
    assert isinstance(lane, ThreadLane)
    dist.all_reduce(torch.ones(1), group=lane.group)
    backend: Any = lane.group._get_backend(device)
    return backend.options._timeout.total_seconds(), lane.group is parent, dist.get_process_group_ranks(lane.group)


def test_a_lane_has_its_own_group_with_the_parents_ranks_and_timeout(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(4, open_sibling) == [(17.0, False, [0, 2]), (17.0, False, [1, 3])] * 2


def descriptors() -> int:
    """Return how many file descriptors the process holds."""
    return len(os.listdir("/proc/self/fd"))


def train_anew(device: torch.device) -> list[int]:
    """Train in halves of the world, with one new state after the other, which ranks collect at unlike times.

    Returns the number of groups after each.
    """
    group, held, most = halves()[dist.get_rank() % 2], [], 0
    kept: list[Any] = []
    gc.disable()
    for i in range(9):
        model = ddp(Probe([40]), device, process_group=group)
        model.register_comm_hook(GAFState(group, tau=1.0), gaf_hook)
        model(torch.ones(40, device=device)).backward()
        assert model.module.parts[0].grad.tolist() == [1.0] * 40
        kept = [*kept, model][-dist.get_rank() :] if dist.get_rank() else []  # rank 3 keeps three of them
        del model
        if i % 2 or dist.get_rank() != 1:
            gc.collect()
        held.append(len(dist.distributed_c10d._world.pg_map))
        most = descriptors() if i == 4 else most
    until = time.monotonic() + 20  # gloo closes what it no longer needs a little later
    while descriptors() > most and time.monotonic() < until:
        time.sleep(0.05)
    assert descriptors() <= most
    return held


@pytest.mark.skipif(not CAN_CLOSE, reason="before torch 2.14 groups are not closed")
def test_states_that_come_and_go_hold_no_more_groups_and_descriptors(gloo_ranks: Ranks) -> None:
    for held in gloo_ranks(4, train_anew):
        assert held[4:] == [held[4]] * 5


def open_and_lose(device: torch.device) -> list[int]:
    """Open lanes of which rank 0 keeps the first, the others none; return the numbers of groups."""
    first, lanes = world(), []
    counts: list[int] = []
    for _ in range(4):
        lanes.append(open_lane(world(), device, None, 64))
        first = lanes[0].group if not counts else first
        del lanes[dist.get_rank() == 0 :]
        gc.collect()
        counts.append(len(dist.distributed_c10d._world.pg_map))
    dist.barrier(first)
    return counts


def test_a_group_is_not_closed_while_any_rank_needs_it(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(3, open_and_lose) == [[3, 5, 5, 5] if CAN_CLOSE else [3, 5, 7, 9]] * 3
