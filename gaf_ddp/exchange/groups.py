"""Process groups beside DDP's, of the same ranks, for one lane's own messages; closed once nobody needs them."""

import weakref
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from gaf_ddp.exchange.point_to_point import MOST_SWAPPING, meet
from gaf_ddp.runtime.errors import named


class Siblings(NamedTuple):
    """The groups of one lane.

    Attributes:
        group: for gradients.
        small_messages: for what is swapped, which would wait behind megabytes of gradients. The same group where
            ranks are too many to swap.
    """

    group: dist.ProcessGroup
    small_messages: dist.ProcessGroup


# Before torch 2.14 the name of a group follows from how many there are: after one is closed, names come twice.
CAN_CLOSE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)

_opened: "WeakKeyDictionary[dist.ProcessGroup, list[tuple[Siblings, weakref.ref[object]]]]" = WeakKeyDictionary()


def open_siblings(parent: dist.ProcessGroup, device: torch.device, owner: object) -> Siblings:
    """Return new groups for owner, a collective of parent; close those of owners that are gone on every rank.

    Each holds threads and connections until it is closed, before torch 2.14 as long as the process lives. That
    happens here, where all ranks are: each collects its garbage at another time.
    """
    opened = _opened.setdefault(parent, [])
    # `new_group` would wait for a rank that died until the time-out, and not say for whom.
    with named("before the first bucket"):
        unused = meet(parent, [CAN_CLOSE and former() is None for _, former in opened])
    for index in reversed(range(len(unused))):
        if unused[index]:
            for group in set(opened.pop(index)[0]):
                dist.destroy_process_group(group)
    group = _sibling(parent, device)
    siblings = Siblings(group, _sibling(parent, device) if parent.size() <= MOST_SWAPPING else group)
    opened.append((siblings, weakref.ref(owner)))
    return siblings


def _sibling(parent: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Return a new group of the parent's ranks, backend and time-out (`new_group` alone takes the default's)."""
    ranks = dist.get_process_group_ranks(parent)
    backends = dict(pair.split(":") for pair in dist.get_backend_config(parent).split(","))
    group = dist.new_group(
        ranks,
        timeout=_timeout(parent, device),
        backend=backends[device.type],
        use_local_synchronization=len(ranks) < dist.get_world_size(),
        group_desc="gaf_ddp",
    )
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    return group


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    backend: Any = group._get_backend(device)
    timeout: timedelta = backend.options._timeout
    return timeout
