"""The first bucket: whose group it is, what ranks must have been told alike, and the way buckets take from here.

What ranks must have alike is compared in full here, and as a number with every decision.
"""

import warnings
from collections.abc import Callable, Iterable
from gc import get_objects
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp.device import kernels
from gaf_ddp.hosts import ByHosts, numbered, own_host
from gaf_ddp.pipeline import Pipeline
from gaf_ddp.settings import as_text, describe, require_same, versions
from gaf_ddp.state import GAFState

_LASTING = ("scope", "exchange", "wire_dtype", "sketch_size", "watch")  # what a pipeline is made for


def connect(state: GAFState, bucket: Any) -> Pipeline:
    """Return the way of this model's buckets; made at the first bucket, anew for a new group.

    Raises:
        ValueError: there is no group, it is not the model's, or the ranks' settings differ.
    """
    group = state.process_group or dist.group.WORLD
    if group is None:
        raise ValueError("process_group is None and there is no default group: call init_process_group first")
    if isinstance(state._pipeline, Pipeline) and state._pipeline.group is group:
        return state._pipeline
    _require_group(group, bucket.parameters())
    if group.size() == 1:
        message = "gaf_ddp: world size 1, there are no other gradients to filter against"
        warnings.warn(message, stacklevel=3)
    # A schedule that raises does so before the others are met: their errors name this rank then.
    settings = {
        **shared(state, state._weighting_now(), bucket.buffer().device),
        "step": state.step,
        "host": own_host(),
    }
    lasting = {name: getattr(state, name) for name in _LASTING}
    pipeline = Pipeline(group, bucket.buffer().device, judge=state._judge, **lasting)
    everyone = require_same(as_text(settings), pipeline.lane.group, pipeline.device)
    state._statistics.hosts = [each["host"] for each in everyone]
    state._statistics.speaks = group.rank() == 0
    if state.voters == "host":
        pipeline.judge = ByHosts(state._judge, numbered(state._statistics.hosts), pipeline.device)
    state._pipeline = pipeline
    return pipeline


def shared(state: GAFState, weighting: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, object]:
    """Return what must be the same on every rank when it decides by this weighting."""
    names = (*_LASTING, "start_step", "max_norm_ratio", "vote_momentum", "voters", "check_every")
    return {
        "tau": getattr(weighting, "tau", "none") if callable(state.tau) else state.tau,
        "weighting": describe(weighting),
        **{name: getattr(state, name) for name in names},
        "max_consecutive_skips": state.max_consecutive_skips,
        "skip_on_disagreement": state._skips,
        "fused kernels": kernels(device.type) is not None,
        **versions(),
    }


def _require_group(group: dist.ProcessGroup, parameters: Iterable[Tensor]) -> None:
    """Raise ValueError if the DDP model that holds these parameters averages over another group.

    A hook is not told its model, and torch has no way to ask. So this looks for the model among all objects, some
    100 ms once; one that is not found, as after `gc.freeze()`, is not compared.
    """
    wanted = {id(parameter) for parameter in parameters}
    # Not isinstance, which asks an abstract class about each of some 400,000 objects: half a second.
    for model in [each for each in get_objects() if DistributedDataParallel in type(each).__mro__]:
        theirs = getattr(model, "process_group", group)
        if theirs.group_name != group.group_name and wanted <= {id(parameter) for parameter in model.parameters()}:
            ranks, their_ranks = dist.get_process_group_ranks(group), dist.get_process_group_ranks(theirs)
            raise ValueError(
                f"process_group must be the model's own, found {group.group_name!r} of ranks {ranks} beside "
                f"the model's {theirs.group_name!r} of ranks {their_ranks}"
            )
