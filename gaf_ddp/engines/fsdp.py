"""filter_fsdp: Gradient Agreement Filtering for models of fully_shard (FSDP2), in the two ways of the DDP hook.

One step late the whole model's gradient is judged, and torch's own reduce-scatter adds up what ranks have scaled:

    sketch += fold(gradient);  gradient *= share
    reduce_scatter(gradient);  all_reduce(share)
    all_gather(ballot)                               once a step, with backward's end

At once each unit, what one call of fully_shard made, is judged by itself:

    rows      = exchange.scatter(gradient)()         (W, n)  what this rank judges of every rank's gradient
    gramian   = exchange.sum(gram(rows))             (W, W)  all inner products between the ranks' gradients
    weights   = decide(gramian, weighting)           (W,)    which ranks agree, and how much each counts
    shard     = combine(rows, weights)               (n,)    of exact slices; else torch's own reduce-scatter
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp.connect import warn_if_alone
from gaf_ddp.engines.fsdp_units import Unit, units_of
from gaf_ddp.engines.fsdp_ways import AtOnce, OneStepLate
from gaf_ddp.engines.parts import require_replica, tensor_group_of
from gaf_ddp.given import require_new, require_state
from gaf_ddp.kernels.gram import combine
from gaf_ddp.kernels.scale import correct
from gaf_ddp.settings import require
from gaf_ddp.state import GAFState


def filter_fsdp(model: nn.Module, state: GAFState) -> GAFState:
    """Let the gradients of a model of fully_shard be averages of those that agree.

        fully_shard(model)
        state = filter_fsdp(model, GAFState())

    Every rank that has a gradient is judged. With replicas (HSDP) these are the ranks of all replicas. Gradients are
    judged in the dtype in which they are reduced (`MixedPrecisionPolicy(reduce_dtype=...)`). A step is a backward that
    reduce-scatters. A backward under `set_requires_gradient_sync(False)` is no step: its gradient is added to the next
    one's, and they are judged as one.

    Sends, beside torch's own reduce-scatter: one step late 16 bytes a unit and once a step 4 k bytes to each other
    rank. At once, with exact slices, a reduce-scatter's bytes in its place (with several ranks per host more of them
    leave a host), or with gather `(W − 1) N` elements more, and at most `W (W + 1)` float64 numbers. Works where torch
    reduce-scatters, on accelerators on its stream, and waits there for nothing of this step.

    Args:
        model: after all calls of fully_shard; a custom reduce-scatter that a unit has stays its own.
        state: of this model alone. `decisions` has the sharded parameters. `process_group` is needed only with
            replicas, where they are not all of the job's ranks.

    Returns:
        The state.

    Raises:
        TypeError: state is no GAFState, or model is not of fully_shard.
        ValueError: with tau or a weighting, scope is "model", which would hold the gradient unsharded; wire_dtype is
            set, `reduce_dtype` is that here; check_every is set; state filters another model; the process group has
            other ranks than the model; replicas are to be judged by slices; units have unlike ranks, or tensor
            parallel parameters without `replica_group`. In backward: the ranks' settings differ.
        RuntimeError: this torch's fully_shard is unknown. At once, in backward: gradients are reduced outside of it,
            or inside of another, as checkpoints with `use_reentrant=True` do.
    """
    require_state(state)
    rule = "scope must be 'bucket' under fully_shard, 'model' would hold the gradient unsharded"
    require(state._is_late or state.scope != "model", rule, state.scope)
    rule = "wire_dtype must be None under fully_shard: use MixedPrecisionPolicy(reduce_dtype=...)"
    require(state.wire_dtype is None, rule, state.wire_dtype)
    rule = "check_every must be None under fully_shard, whose parameters are no replicas"
    require(state.check_every is None, rule, state.check_every)
    require_new(state)
    units = units_of(model)
    group = voters_of(state, units[0])
    tensor_group = tensor_group_of((each for unit in units for each in unit.parameters), units[0].ranks)
    require_replica(state.replica_group, tensor_group)
    warn_if_alone(state, group, stacklevel=2)
    way = OneStepLate(state, units, group, model, tensor_group) if state._is_late else AtOnce(state, units, group)
    for unit in units:
        unit.set_reduce_scatter(_ReduceScatter(way, unit))
        if group.size() == 1:
            unit.set_hook(partial(way.judge_unit, unit))
    state._way = way
    return state


class _ReduceScatter:
    """What a unit's gradients are reduce-scattered by; its interface is torch's `ReduceScatter`."""

    def __init__(self, way: OneStepLate | AtOnce, unit: Unit) -> None:
        self._way, self._unit, self._native = way, unit, unit.reduce_scatter

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory that torch takes."""
        memory: Tensor = self._native.allocate(size, dtype=dtype, device=device)
        return memory

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Write the average of the gradients `(N,)` that agree into output, `(N/W,)`; overwrites input."""
        native = partial(self._native, output_tensor, input_tensor, group=group, op=op, async_op=async_op)
        if isinstance(self._way, OneStepLate):
            if self._way.is_reading:
                self._way.fold_reading(self._unit, input_tensor)
                output_tensor.zero_()
                return None
            share = self._way.judge_unit(self._unit, input_tensor)
            work = native()
            if work is not None:
                work.wait()
            correct(output_tensor, self._way.add_up(share))
            return work
        rows, weights = self._way.judge_unit(self._unit, input_tensor)
        if self._way.by_slices:
            combine(rows, _divided(weights, op, self._way.size), out=output_tensor)
            return None
        combine(input_tensor[None], weights[self._way.own], out=input_tensor)
        return native()


def _divided(weights: Tensor, op: Any, size: int) -> Tensor:
    """Return the weights of a sum that does what op does."""
    rule = "set_gradient_divide_factor is for exchange 'sketch' or 'gather'; else op must be AVG or SUM"
    require(op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM), rule, op)
    return weights / size if op == dist.ReduceOp.AVG else weights


def voters_of(state: GAFState, unit: Unit) -> dist.ProcessGroup:
    """Return the group of all ranks that have a gradient; in the order of slices."""
    group = state.process_group or unit.everyone()
    ranks = sorted(dist.get_process_group_ranks(group))
    require(ranks == unit.ranks, f"process_group must have the model's ranks {unit.ranks}", ranks)
    return group if unit.is_replicated else unit.shards
