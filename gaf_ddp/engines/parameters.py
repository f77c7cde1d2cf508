"""filter_parameters: Gradient Agreement Filtering for whatever averages gradients, by hooks on the parameters.

    gradient → sketch += fold(gradient);  return gradient * share      as autograd has it, before the engine does
    …                                                                  the engine averages
    state.advance()                                                    all_gather(ballot), once a step

A rank's share is known since the last verdict, so nothing is asked of the others meanwhile, and hooks may fire in
another order on each rank. The engine's average cannot be read or corrected here.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from gaf_ddp.ballots.late import LateFilter
from gaf_ddp.ballots.places import numbers_of
from gaf_ddp.connect import meet, warn_if_alone
from gaf_ddp.engines.apart import Loss
from gaf_ddp.engines.parts import require_replica, tensor_group_of
from gaf_ddp.engines.shown import as_vector, is_part, like, require_seen, require_shown, trained
from gaf_ddp.given import group_of, require_new, require_state
from gaf_ddp.kernels.fold import Span, fold, spans_of
from gaf_ddp.runtime.errors import named
from gaf_ddp.settings import require
from gaf_ddp.skip import unwrapped
from gaf_ddp.state import GAFState
from gaf_ddp.way import Way

_WHOLE = ()  # the key of the one bucket that a step's gradient is


def filter_parameters(
    parameters: Iterable[Tensor],
    state: GAFState,
    process_group: dist.ProcessGroup | None = None,
    advance_with: Optimizer | None = None,
) -> Callable[[], None]:
    """Let gradients be averages of those that agree, whatever engine averages them: a collective.

        filter_parameters(model.parameters(), state := GAFState())
        loss.backward(); …; optimizer.step(); state.advance()

    For engines that take no communication hook, or have another one: loops with `all_reduce`, FSDP1, DeepSpeed's
    ZeRO 0 to 3, Megatron's DDP, torchft, DDP beside PowerSGD. FSDP2 calls no hooks of parameters: `filter_fsdp`.

    Each gradient that a backward shows is folded into the rank's ballot, and goes on as a new tensor. It is multiplied
    by W / (ranks that count), as engines divide by W; a rank that is left out passes on zeros. Where all count,
    gradients are left as they are.

    All backwards up to `state.advance()` are one step, and their gradients one gradient. `max_norm_ratio` limits its
    norm, which adds up as backward goes: once it exceeds the limit, the parts that follow are scaled down. After NaN or
    infinity they are zeros, and the average of that step is smaller. If no rank had a finite gradient, the next step's
    pass as they are, so that a loss scale backs off.

    `state.reference` needs whole parameters, not those of FSDP1 and ZeRO 3. Let its loss call the module inside the
    engine, in `eval()` mode if it has buffers: nobody here knows the model.

    With `replica_group` a rank is left out or not, and nothing else: what is long, or not finite, is left to the
    engine, since ranks of one replica would have to do the same to what is replicated over them.

    A rank sends 4 k + 200 bytes a step to each other one. Each parameter takes a fold and a scale in each backward:
    three launches with Triton, and memory of its gradient once more until the engine has taken it.

    Args:
        parameters: that the engine averages gradients of, in the same order on every rank; after it has wrapped the
            model. Whole tensors, or what FSDP1 and ZeRO 3 make of them. All on one device.
        state: of these alone, with the consensus rule. `check_every` compares parameters, not sums.
        process_group: that gradients are averaged over; None is the state's, or the default group.
        advance_with: an optimizer, also as Accelerate, Fabric or Lightning wrap it, whose every step ends with
            `state.advance()`. Not ZeRO's, which steps by groups; under GradScaler a step that it leaves out is one
            step with the next.

    Returns:
        A function that undoes this, on every rank alike; it waits for ballots that were sent, and raises
        RuntimeError where a rank is lost, but this is undone then, too.

    Raises:
        TypeError: parameters are no tensors, state is no GAFState, or advance_with is no optimizer. In backward: a
            gradient is sparse.
        ValueError: tau, a weighting or wire_dtype is set; check_every is, and parameters are no replicas; there are
            no parameters, or on several devices, or spread by tensor parallelism without `replica_group`; the state
            has another process group or filters another model; the ranks' settings differ.
        RuntimeError: in backward and `advance()`: the engine made gradients that no hook saw, or that have a graph.
    """
    require_state(state)
    known = trained(parameters)
    _require_settings(state, known)
    group = group_of(state, process_group)
    require_replica(state.replica_group, tensor_group_of(known, dist.get_process_group_ranks(group)))
    optimizer = None if advance_with is None else unwrapped(advance_with)
    warn_if_alone(state, group, stacklevel=2)
    way = _Parameters(known, state, group)
    handles = [each.register_hook(partial(way.see, number)) for number, each in enumerate(known)]
    if optimizer is not None:
        handles.append(optimizer.register_step_post_hook(lambda *_: way.advance()))
    state._way, state._awaits_hook = way, True

    def undo() -> None:
        while handles:
            handles.pop().remove()
        if state._way is way:
            try:
                way.draw()
            finally:  # also where a rank is lost: its group ends with the last reference to it
                state._way = None

    return undo


class _Parameters(Way):
    """The way of gradients that hooks see."""

    def __init__(self, parameters: list[Tensor], state: GAFState, group: dist.ProcessGroup) -> None:
        self.group, self._state, self._parameters = group, state, parameters
        sizes = [tuple(each.shape) for each in parameters]
        meet(state, group, parameters[0].device, {"parameters": f"{len(sizes)} of shapes {sizes}"})
        self._late = LateFilter(state, group, parameters[0].device, averages=True, in_buckets=False)
        self._places = self._late.places.ranges(parameters)
        self._seen: set[int] = set()  # numbers of parameters, since training began
        self._all_shown = False
        self._passes = self._is_reading = False

    def see(self, number: int, gradient: Tensor) -> Tensor | None:
        """Fold a parameter's gradient; return it scaled, None where it may go on as it is."""
        if self._is_reading:
            return None
        parameter, late = self._parameters[number], self._late
        with named(f"step {self._state.step}, parameter {number}"), torch.no_grad():
            require_shown(parameter, gradient)
            if not late.is_open:
                self._begin()
            self._seen.add(number)
            vector = as_vector(gradient)
            late.ballot.fold(vector, (Span(0, self._places[number], len(vector)),), self._square)
            if self._passes or self._state.watch or self.group.size() == 1:
                return None
            if self._state.replica_group is not None:
                weighed = late.share.weigh(vector)
                return None if weighed is None else like(gradient, weighed)
            scaled = torch.empty_like(vector)
            late.share.scale(vector, _WHOLE, self._square, scaled)
            return like(gradient, scaled)

    def advance(self) -> None:
        """End a step: send the ballot."""
        with named(f"step {self._state.step}"), torch.no_grad():
            if not self._all_shown:
                require_seen(self._parameters, self._seen)
                self._all_shown = bool(self._seen)
            if not self._late.is_open:
                self._begin()
            self._late.end()
        self._state._awaits_hook = not self._seen

    def read(self, loss: Loss) -> None:
        """Fold the two gradients of a loss on held-out data, which the hooks see and leave alone."""
        if any(map(is_part, self._parameters)):
            raise RuntimeError("reference needs whole parameters, found parts of them, as FSDP1 and ZeRO 3 make")
        counts, size = map(numbers_of, self._parameters), self._state.sketch_size
        spans = spans_of(zip(self._places, counts, strict=True))
        self._is_reading = True
        try:
            self._late.readings.read(loss, self._parameters, None, lambda gradient: fold(gradient, spans, size)[0])
        finally:
            self._is_reading = False

    def draw(self) -> None:
        """Wait for the ballots that were sent."""
        self._late.draw()

    def recall(self) -> None:
        """Begin with what the judge remembers."""
        self._late.recall()

    def _begin(self) -> None:
        self._late.begin()
        self._square = self._late.ballot.new_square(_WHOLE)
        last = self._state._records.decisions
        # If no rank's last gradient was finite. Else a GradScaler would see zeros, and never back off.
        self._passes = bool(last) and bool(last[0].agreement.nonfinite.all())


def _require_settings(state: GAFState, parameters: Sequence[Tensor]) -> None:
    rule = "filter_parameters filters by the consensus rule alone: leave tau and weighting None"
    require(state._is_consensus, rule, state.weighting or state.tau)
    rule = "wire_dtype must be None, it is for the engine to say"
    require(state.wire_dtype is None, rule, state.wire_dtype)
    rule = "check_every must be None where parameters are no replicas, as under FSDP1 and ZeRO 3"
    require(state.check_every is None or not any(map(is_part, parameters)), rule, state.check_every)
    require_new(state)
