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
from gaf_ddp.given import or_default
from gaf_ddp.runtime.device import kernels
from gaf_ddp.runtime.errors import named
from gaf_ddp.runtime.hosts import own_host
from gaf_ddp.runtime.presence import told_after, wait_for_everyone
from gaf_ddp.state import GAFState

_PATIENCE = 60.0  # seconds with other ranks, before people are told


def connect(state: GAFState, bucket: Any) -> LateFilter | Pipeline:
    """Return the way of this model's buckets: made at the first one, anew for a new group and for the other way.

    Raises:
        ValueError: there is no group, it is not the model's, the ranks' settings differ, or the bucket is another
            model's.
    """
    group = or_default(state.process_group)
    parameters = bucket.parameters()
    way = state._way
    if way is not None and state._model is None:
        raise ValueError("state must be of this model, found one that filters another: make a GAFState for each model")
    assert way is None or isinstance(way, (LateFilter, Pipeline))
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
    with told_after(_PATIENCE, f"rank {group.rank()} waits for the others before the first bucket"):
        if device.type == "cpu":
            with named("before the first bucket (is the hook on every rank?)"):
                wait_for_everyone(group)
        everyone = require_same(as_text({**told, "host": own_host()}), group, device)
    statistics = state._records.statistics
    statistics.hosts, statistics.speaks = [each["host"] for each in everyone], group.rank() == 0
    state._is_connected = True
    hosts = len({*statistics.hosts})
    if state.voters == "host" and hosts < 3 <= group.size() and statistics.speaks:
        found = f"found {hosts} host{'s' * (hosts > 1)}, which cannot outvote each other: nobody is left out"
        warnings.warn(f"gaf_ddp: voters='host' needs three hosts or more, {found}", stacklevel=4)


def warn_if_alone(state: GAFState, group: dist.ProcessGroup, stacklevel: int) -> None:
    """Warn, one rank for all, that there is nothing to filter against."""
    if group.size() == 1:
        found = "there are no other gradients to filter against"
    elif group.size() == 2 and state._is_consensus and group.rank() == 0:
        found = "two ranks cannot outvote each other: the consensus rule leaves one out from three ranks on"
    else:
        return
    warnings.warn(f"gaf_ddp: world size {group.size()}, {found}", stacklevel=stacklevel + 1)


def _make(state: GAFState, bucket: Any, group: dist.ProcessGroup) -> LateFilter | Pipeline:
    device, parameters = bucket.buffer().device, state._model.parameters_or(bucket.parameters())
    tensor_group = tensor_group_of(parameters)  # whatever DDP's parameters are spread over
    require_replica(state.replica_group, tensor_group)
    way: LateFilter | Pipeline = (
        LateFilter(state, group, device, tensor_group=tensor_group)
        if state._is_late
        else Pipeline(state, group, device)
    )
    state._way = way
    return way
