"""The two ways of the gradients of a model of fully_shard: who judges them, and the step they are in."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp.alike import Fingerprints, as_text, shared
from gaf_ddp.ballots.late import LateFilter
from gaf_ddp.connect import meet
from gaf_ddp.engines.apart import Loss, apart, require_loss
from gaf_ddp.engines.fsdp_units import Unit
from gaf_ddp.exchange.gather import GatherExchange
from gaf_ddp.exchange.protocol import Exchange
from gaf_ddp.exchange.sharded import ShardedExchange
from gaf_ddp.exchange.sketched import SketchExchange
from gaf_ddp.kernels.gram import gram
from gaf_ddp.monitor.records import Decision
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.held_out import TEMPERATURES
from gaf_ddp.runtime.backward import at_end_of_backward, number_of_backward
from gaf_ddp.runtime.errors import named
from gaf_ddp.settings import require
from gaf_ddp.way import Way

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState


class OneStepLate(Way):
    """Scale a unit's gradient, and judge the whole model's a step later."""

    def __init__(
        self,
        state: "GAFState",
        units: list[Unit],
        group: dist.ProcessGroup,
        model: nn.Module,
        tensor_group: dist.ProcessGroup | None,
    ) -> None:
        self.group, self._model, self._tensor_group = group, model, tensor_group
        self._state, self._units = state, units
        self._late: LateFilter | None = None
        self._seen: set[Unit] = set()  # in this step
        self._backward: int | None = None  # at whose end the step may end
        self._stream: Any = None  # torch's own for reduce-scatters
        self._reading: Tensor | None = None  # (k,), while held-out data are read

    def judge_unit(self, unit: Unit, gradient: Tensor) -> Tensor:
        """Fold and scale one unit's gradient `(N,)`; return this rank's share `(2,)`."""
        with named(f"step {self._state.step}, unit {unit.name or 'root'}"):
            if self._late is None:
                meet(self._state, self.group, gradient.device)
                self._late = LateFilter(
                    self._state, self.group, gradient.device, averages=True, tensor_group=self._tensor_group
                )
            if not self._late.is_open or unit in self._seen:
                self._late.begin()
                self._seen.clear()
            self._seen.add(unit)
            self._stream = torch.get_device_module(gradient.device).current_stream()
            self._end_with(number_of_backward())
            return self._late.weigh(gradient, unit.parameters, gradient.numel())[0]

    def add_up(self, share: Tensor) -> Tensor:
        """Return the sum over the ranks `(2,)`, in the unit that `correct` expects."""
        if self.group.size() > 1:
            dist.all_reduce(share, group=self.group)
        return share / self.group.size()

    @property
    def is_reading(self) -> bool:
        """Whether gradients are those of held-out data, to be folded alone."""
        return self._reading is not None

    def fold_reading(self, unit: Unit, gradient: Tensor) -> None:
        """Add one unit's gradient `(N,)` of held-out data to the reading."""
        assert self._reading is not None
        assert self._late is not None
        self._reading += self._late.fold(gradient, unit.parameters, gradient.numel())

    def read(self, loss: Loss) -> None:
        """Fold the two gradients of a loss on held-out data, apart from training, for a later ballot."""
        late = self._late
        if late is None:
            return
        readings = []
        for temperature in TEMPERATURES:
            self._reading = torch.zeros(self._state.sketch_size, dtype=torch.float32, device=late.device)
            kept = [(parameter, parameter.grad) for parameter in self._model.parameters()]
            try:
                with apart(self._model, late.device):
                    for parameter, _ in kept:
                        parameter.grad = None
                    value = require_loss(loss(temperature))
                    value.backward()
                readings.append(self._reading)
            finally:
                self._reading = None
                for parameter, gradient in kept:
                    parameter.grad = gradient
        late.readings.put(readings, value.detach().double().view(()))

    def draw(self) -> None:
        """Wait for the ballots that were sent."""
        if self._late is not None:
            self._late.draw()

    def recall(self) -> None:
        """Begin with what the judge remembers."""
        if self._late is not None:
            self._late.recall()

    def _end_with(self, backward: int | None) -> None:
        if backward != self._backward and at_end_of_backward(self._end):
            self._backward = backward

    def _end(self, waited: bool = False) -> None:
        """End the step with backward, where torch's own callbacks have had the units that are left.

        One that ends inside of another backward leaves the step to the next one's first unit.
        """
        if any(unit.in_backward for unit in self._units):
            if not waited:
                at_end_of_backward(partial(self._end, True))
            return
        if self._late is not None and self._late.is_open:
            with torch.get_device_module(self._late.device).stream(self._stream):  # backward's may not wait for it
                self._late.end()


class AtOnce(Way):
    """Judge each unit by itself, exactly, as its gradient comes."""

    def __init__(self, state: "GAFState", units: list[Unit], group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()
        self.own = slice(group.rank(), group.rank() + 1)
        self.by_slices = state.exchange in ("auto", "sharded")
        rule = "exchange must be 'sketch' or 'gather' where fully_shard has replicas"
        require(not (self.by_slices and units[0].is_replicated), rule, state.exchange)
        self._exchange: Exchange = (
            SketchExchange(group, state.sketch_size)
            if state.exchange == "sketch"
            else (ShardedExchange if self.by_slices else GatherExchange)(group)
        )
        self._state, self._units = state, units
        self._fingerprints: Fingerprints | None = None
        self._decided: list[Decision] = []  # in this step
        self._numbers: list[Tensor] = []  # of the settings and weights that each rank decided by
        self._backward: int | None = None  # the one that the step is
        self._stream: Any = None  # torch's own for reduce-scatters

    def judge_unit(self, unit: Unit, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows, and the weights `(W,)` in the unit of ranks that count 1/W each, of one unit's gradient."""
        state = self._state
        self._begin(number_of_backward())
        with named(f"step {state.step}, unit {unit.name or 'root'}"):
            self._stream = torch.get_device_module(gradient.device).current_stream()
            if self._fingerprints is None:
                meet(state, self.group, gradient.device)
                self._fingerprints = Fingerprints(self.group, gradient.device)
            weighting, settings = state._weighting_at(state.step), as_text(shared(state))
            rows = self._exchange.scatter(gradient)
            summed = self._exchange.sum(torch.cat([gram(rows), self._fingerprints.own(settings)]))
            self._fingerprints.require_same(settings, summed[self.size :])
            agreement = decide(summed[: self.size], weighting, state.max_norm_ratio)
            self._fingerprints.remember(agreement.weights)
            self._decided.append(Decision(agreement, unit.parameters))
            self._numbers += summed[self.size :].unbind()
        return rows, agreement.weights * self.size

    def _begin(self, backward: int | None) -> None:
        """Begin a step with the first unit of a backward."""
        if backward is not None and backward == self._backward:
            return
        if not at_end_of_backward(self._end):
            raise RuntimeError("gaf_ddp: gradients must be reduced in backward, found one that is reduced outside")
        self._backward = backward
        self._decided, self._numbers = [], []  # a backward that broke off may have left some

    def _end(self, waited: bool = False) -> None:
        """End the step with backward, where torch's own callbacks have had the units that are left."""
        if any(unit.in_backward for unit in self._units):
            if waited:
                rule = "gradients must be reduced in one backward, found one inside of another"
                raise RuntimeError(f"gaf_ddp: {rule}: are there checkpoints with use_reentrant=True?")
            at_end_of_backward(partial(self._end, True))
            return
        module = torch.get_device_module(self._numbers[0].device)
        with module.stream(self._stream), torch.no_grad():
            step = self._state.step
            self._state._end_step()
            self._state._records.add(step, self._decided, self._numbers, self._state.max_consecutive_skips)
        module.current_stream().wait_stream(self._stream)
