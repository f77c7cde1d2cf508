"""filter_fsdp: Gradient Agreement Filtering for models of fully_shard (FSDP2), one decision per unit.

rows      = exchange.scatter(gradient)()     (W, n)  what this rank judges of every rank's gradient
gramian   = exchange.sum(measure(rows))      (W, W)  all inner products between the ranks' gradients
agreement = judge.decide(gramian, weighting) (W,)    which ranks agree, and how much each counts
shard     = combine(rows, weights)           (n,)    of exact slices; else each rank's gradient is scaled by its
                                                     weight, and torch's own reduce-scatter adds them up
"""

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp.agreement import Agreement
from gaf_ddp.connect import shared
from gaf_ddp.errors import named
from gaf_ddp.exchange import Exchange, GatherExchange, ShardedExchange
from gaf_ddp.fsdp_units import Unit, current_backward, units_of
from gaf_ddp.gramian import Rows, combine
from gaf_ddp.hosts import ByHosts, numbered, own_host
from gaf_ddp.lanes import at_end_of_backward
from gaf_ddp.pipeline import Decision
from gaf_ddp.settings import Fingerprints, as_text, require, require_same
from gaf_ddp.sketch_exchange import SketchExchange
from gaf_ddp.state import GAFState


def filter_fsdp(model: nn.Module, state: GAFState) -> GAFState:
    """Let the gradients of a model of fully_shard be averages of those that agree.

        fully_shard(model)
        state = filter_fsdp(model, GAFState())

    Each unit (what one call of fully_shard made) is judged as its gradient is reduce-scattered, by all ranks that
    have one: with replicas (HSDP) by all of them. Gradients are in the dtype they are reduced in
    (`MixedPrecisionPolicy(reduce_dtype=...)`). A step is a backward that reduce-scatters: those under
    `set_requires_gradient_sync(False)` are none, and what they left is judged as one gradient with the next.

    Sends, per rank and unit of N elements: with sketches `(W − 1) k` float32 numbers beside torch's own
    reduce-scatter; exact slices a reduce-scatter's bytes, `(W − 1)/W N` elements, in its place (with several ranks
    per host more of them leave a host); gather `(W − 1) N` elements more. All of them all-reduce at most
    `W (W + 1)` float64 numbers. Works where torch reduce-scatters, on accelerators on its stream, and waits there
    for nothing but to compare the ranks' settings at the first unit. Holds `W k` numbers, N elements, or `W N`.

    Args:
        model: after all calls of fully_shard; a custom reduce-scatter that a unit has stays its own.
        state: of this model alone. Its scope is "running", each unit by the whole gradient as known then, or
            "bucket", each by its own. `decisions` has each unit's sharded parameters. `process_group` is needed
            only with replicas, where they are not all of the job's ranks.

    Returns:
        The state.

    Raises:
        TypeError: state is no GAFState, or model is not of fully_shard.
        ValueError: scope is "model", which would hold the gradient unsharded; wire_dtype is set, `reduce_dtype` is
            that here; state filters another model; the process group has other ranks than the model; replicas are
            to be judged by slices; units have unlike ranks or tensor parallel parameters. In backward: the ranks'
            settings differ.
        RuntimeError: this torch's fully_shard is unknown. In backward: gradients are reduced outside of it, or
            inside of another, as checkpoints with `use_reentrant=True` do.
    """
    if not isinstance(state, GAFState):
        raise TypeError(f"state must be a GAFState, found {type(state).__name__}")
    rule = "scope must be 'bucket' or 'running' under fully_shard, 'model' would hold the gradient unsharded"
    require(state.scope != "model", rule, state.scope)
    rule = "wire_dtype must be None under fully_shard: use MixedPrecisionPolicy(reduce_dtype=...)"
    require(state.wire_dtype is None, rule, state.wire_dtype)
    rule = "check_every must be None under fully_shard, whose parameters are no replicas"
    require(state.check_every is None, rule, state.check_every)
    if state._pipeline is not None:
        raise ValueError("state must be of one model alone, found one that filters another, or this already")
    units = units_of(model)
    way = _Way(state, units)
    if way.group.size() == 1:
        message = "gaf_ddp: world size 1, there are no other gradients to filter against"
        warnings.warn(message, stacklevel=2)
    for unit in units:
        unit.set_reduce_scatter(_ReduceScatter(way, unit))
        if way.group.size() == 1:
            unit.set_hook(partial(way.judge_unit, unit))
    state._pipeline = way
    return state


class _Way:
    """The way of one model's gradients: who judges them, and the step they are in."""

    def __init__(self, state: GAFState, units: list[Unit]) -> None:
        self.state, self.judge, self._units = state, state._judge, units
        self.group = _voters(state, units[0])
        self.size, rank = self.group.size(), self.group.rank()
        self.own = slice(rank, rank + 1)
        self.by_slices = state.exchange in ("auto", "sharded")
        rule = "exchange must be 'sketch' or 'gather' where fully_shard has replicas"
        require(not (self.by_slices and units[0].is_replicated), rule, state.exchange)
        self.exchange: Exchange = (
            SketchExchange(self.group, state.sketch_size)
            if state.exchange == "sketch"
            else (ShardedExchange if self.by_slices else GatherExchange)(self.group)
        )
        self._fingerprints: Fingerprints | None = None
        self._decided: list[tuple[Decision, Tensor]] = []  # in this step, with the numbers of the ranks' settings
        self._backward = -1  # the one that the step is
        self._stream: Any = None  # torch's own for reduce-scatters

    def judge_unit(self, unit: Unit, gradient: Tensor) -> tuple[Rows, Agreement]:
        """Return rows and the decision on one unit's gradient `(N,)`."""
        state, device = self.state, gradient.device
        self._begin(current_backward())
        with named(f"step {state.step}, unit {unit.name or 'root'}"):
            self._stream = torch.get_device_module(device).current_stream()
            weighting = state._weighting_now()
            settings = shared(state, weighting, device)
            fingerprints = self._fingerprints or self._connect(settings, device)
            rows = self.exchange.scatter(gradient)()
            text = as_text(settings)
            measured = torch.cat([self.judge.measure(unit, rows), fingerprints.own(text)])
            summed = self.exchange.sum(measured)
            fingerprints.require_same(text, summed[-1])
            agreement = self.judge.decide([unit], summed[:-1], weighting, state.max_norm_ratio)
            self._decided.append((Decision(agreement, unit.parameters), summed[-1]))
        return rows, agreement

    def _connect(self, settings: dict[str, object], device: torch.device) -> Fingerprints:
        """Compare the ranks' settings in full, at host syncs."""
        settings = {**settings, "step": self.state.step, "host": own_host()}
        hosts = [each["host"] for each in require_same(as_text(settings), self.group, device)]
        self.state._statistics.hosts, self.state._statistics.speaks = hosts, self.group.rank() == 0
        if self.state.voters == "host":
            self.judge = ByHosts(self.state._judge, numbered(hosts), device)
        self._fingerprints = Fingerprints(self.group, device)
        return self._fingerprints

    def _begin(self, backward: int) -> None:
        """Begin a step with the first unit of a backward."""
        if backward == self._backward != -1:
            return
        if not at_end_of_backward(self._end):
            raise RuntimeError("gaf_ddp: gradients must be reduced in backward, found one that is reduced outside")
        self._backward, self._decided = backward, []  # a backward that broke off may have left some behind

    def _end(self, waited: bool = False) -> None:
        """End the step with backward, where torch's own callbacks have had the units that are left."""
        if any(unit.in_backward for unit in self._units):
            if waited:
                rule = "gradients must be reduced in one backward, found one inside of another"
                raise RuntimeError(f"gaf_ddp: {rule}: are there checkpoints with use_reentrant=True?")
            at_end_of_backward(partial(self._end, True))
            return
        module = torch.get_device_module(self._decided[0][1].device)
        with module.stream(self._stream), torch.no_grad():
            self.judge.finish()
            decided, self._decided = self._decided, []
            self.state._end_step(decided)
        module.current_stream().wait_stream(self._stream)


class _ReduceScatter:
    """What a unit's gradients are reduce-scattered by; its interface is torch's `ReduceScatter`."""

    def __init__(self, way: _Way, unit: Unit) -> None:
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
        way = self._way
        rows, agreement = way.judge_unit(self._unit, input_tensor)
        # In the unit of op, whatever torch divides by before and after it: that of ranks that count 1/W each.
        weights = agreement.weights * way.size
        if way.by_slices:
            combine(rows, _divided(weights, op, way.size), out=output_tensor)
            return None
        if not way.state.watch:
            combine(input_tensor[None], weights[way.own], out=input_tensor)
        return self._native(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


def _divided(weights: Tensor, op: Any, size: int) -> Tensor:
    """Return the weights of a sum that does what op does."""
    rule = "set_gradient_divide_factor is for exchange 'sketch' or 'gather'; else op must be AVG or SUM"
    require(op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM), rule, op)
    return weights / size if op == dist.ReduceOp.AVG else weights


def _voters(state: GAFState, unit: Unit) -> dist.ProcessGroup:
    """Return the group of all ranks that have a gradient; in the order of slices."""
    group = state.process_group or (dist.group.WORLD if unit.is_replicated else unit.shards)
    assert group is not None  # torch has made a mesh
    ranks = sorted(dist.get_process_group_ranks(group))
    require(ranks == unit.ranks, f"process_group must have the model's ranks {unit.ranks}", ranks)
    return group if unit.is_replicated else unit.shards
