"""The first bucket: whose group it is, what ranks must have been told alike, and the way buckets take from here."""

import warnings
from typing import Any

import torch
import torch.distributed as dist

from gaf_ddp.alike import as_text, require_same, shared
from gaf_ddp.ballots.late import LateFilter
from gaf_ddp.engines.ddp import Model
from gaf_ddp.engines.parts import require_replica, tensor_group_of
from gaf_ddp.exchange.pipeline import Pipeline
from gaf_ddp.runtime.device import kernels
from gaf_ddp.runtime.errors import named
from gaf_ddp.runtime.hosts import own_host
from gaf_ddp.runtime.presence import wait_for_everyone
from gaf_ddp.state import GAFState


def connect(state: GAFState, bucket: Any) -> LateFilter | Pipeline:
    """Return the way of this model's buckets: made at the first one, anew for a new group and for the other way.

    Raises:
        ValueError: there is no group, it is not the model's, the ranks' settings differ, or the bucket is another
            model's.
    """
    group = state.process_group or dist.group.WORLD
    if group is None:
        raise ValueError("process_group is None and there is no default group: call init_process_group first")
    parameters = bucket.parameters()
    way: LateFilter | Pipeline | None = state._way
    if way is not None and state._model is None:
        raise ValueError("state must be of one model alone, found one that filters parameters, or another model")
    if way is None or way.group is not group:
        state._model = Model(parameters)
        state._model.require_group(group)
        warn_if_alone(state, group, stacklevel=3)
        meet(state, group, bucket.buffer().device)
        way = _make(state, bucket, group)
    elif isinstance(way, LateFilter) != state._is_late and not way.is_open:
        state._catch_up()
        way = _make(state, bucket, group)
    state._model.require_own(parameters)
    return way


def meet(
    state: GAFState, group: dist.ProcessGroup, device: torch.device, more: dict[str, object] | None = None
) -> None:
    """Compare what ranks were told, in full, at host syncs, and more that must be alike; from then on it holds.

    Raises:
        ValueError: on every rank: their settings differ.
    """
    # A schedule that raises does so before the others are met: their errors name this rank then.
    told = {**shared(state), "fused kernels": kernels(device.type) is not None, "step": state.step, **(more or {})}
    # Messages name a rank that is not there. And gloo ends a process whose collective meets another one, as DDP's own
    # of a rank without the hook.
    if device.type == "cpu":
        with named("before the first bucket (is the hook on every rank?)"):
            wait_for_everyone(group)
    everyone = require_same(as_text({**told, "host": own_host()}), group, device)
    statistics = state._records.statistics
    statistics.hosts, statistics.speaks = [each["host"] for each in everyone], group.rank() == 0
    state._is_connected = True


def group_of(state: GAFState, given: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group that is given, the state's or the default one, which is the state's from now on.

    Raises:
        ValueError: there is none, the state has another, or it is none of torch.distributed's.
    """
    ours = state.process_group
    if ours is not None and given is not None and ours.group_name != given.group_name:
        raise ValueError(f"process_group must be the state's, {ours.group_name!r}, found {given.group_name!r}")
    group = given or ours or dist.group.WORLD
    if group is None:
        raise ValueError("process_group is None and there is no default group: call init_process_group first")
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        rule = "process_group must be one of torch.distributed, with torchft see gaf_ddp.torchft"
        raise ValueError(f"{rule}, found a {type(group).__module__}.{type(group).__name__}") from None
    if ours is None:
        state.process_group = group
    return group


def warn_if_alone(state: GAFState, group: dist.ProcessGroup, stacklevel: int) -> None:
    """Warn, one rank for all, that there is nothing to filter against."""
    if group.size() == 1:
        found = "there are no other gradients to filter against"
    elif group.size() == 2 and state._ratio is not None and group.rank() == 0:
        found = "two ranks cannot outvote each other: the consensus rule leaves one out from three ranks on"
    else:
        return
    warnings.warn(f"gaf_ddp: world size {group.size()}, {found}", stacklevel=stacklevel + 1)


def _make(state: GAFState, bucket: Any, group: dist.ProcessGroup) -> LateFilter | Pipeline:
    device, parameters = bucket.buffer().device, state._model.parameters_or(bucket.parameters())
    tensor_group = tensor_group_of(parameters)  # whatever DDP's parameters are spread over
    require_replica(state.replica_group, tensor_group)
    if state._is_late:
        state._way = LateFilter(state, group, device, tensor_group=tensor_group)
    else:
        state._way = Pipeline(state, group, device)
    way: LateFilter | Pipeline = state._way
    return way
