"""Buckets on their way at once: out of DDP's hands, through an exchange, to a decision, and back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.alike import Fingerprints, as_text, shared
from gaf_ddp.checks.replicas import ReplicaCheck
from gaf_ddp.exchange.lanes import open_lane
from gaf_ddp.exchange.protocol import Exchange
from gaf_ddp.exchange.thread import Promise
from gaf_ddp.kernels.gram import Rows, gram
from gaf_ddp.monitor.records import Decision
from gaf_ddp.rules.agreement import decide
from gaf_ddp.runtime.errors import named

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState


@dataclass(eq=False)
class Arrival:
    """One bucket between its arrival and its average; of a GradBucket, only what outlives the hook's call."""

    buffer: Tensor  # (N,), DDP's own memory, where the result goes
    parameters: list[Tensor]
    name: str  # which bucket it is, for what goes wrong
    is_first: bool  # of its step
    is_last: bool
    promise: Promise
    exchange: Exchange
    receive: Callable[[], Rows] | None = None  # waits for the rows (W, n)
    rows: Rows = ()
    measured: Tensor | None = None  # (W, W) float64


class Pipeline:
    """The way of one model's buckets, from the first one on; a bucket passes its methods in their order here.

    Args:
        state: the settings, and where records go.
        group: the W ranks that gradients are averaged over.
        device: of the buckets.
    """

    def __init__(self, state: "GAFState", group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.lane = open_lane(group, device, state.wire_dtype, state.sketch_size)
        self.lane.when_idle(self.land)
        self.first_step = True
        self._state = state
        self._latest: int | None = None  # the index of the last bucket taken, None between steps
        self._waiting: list[Arrival] = []  # for a decision
        self._landing: list[tuple[Arrival, Callable[[], None]]] = []  # their averages are on their way
        self._decided: list[Decision] = []  # in this step
        self._numbers: list[Tensor] = []  # of the settings and weights that each rank decided by
        self._fingerprints = Fingerprints(self.lane.group, device)
        self._has_finished = False  # this rank, which waits for the others in DDP's Join
        self._finished = torch.zeros(1, group.size(), dtype=torch.float64, device=device)  # the same, in its column
        self._replicas = ReplicaCheck(state.check_every)

    @property
    def is_open(self) -> bool:
        """Whether this is between a step's first bucket and its last one."""
        return self._latest is not None

    def take(self, bucket: Any) -> Arrival:
        """Start a bucket on its way; in the hook.

        Raises:
            ValueError: it is on another device than the first one.
        """
        buffer: Tensor = bucket.buffer()
        if buffer.device != self.device:
            rule = "all parameters of a rank's model must be on one device"
            raise ValueError(f"{rule}, found {self.device} and {buffer.device}")
        promise, index, is_last = self.lane.promise(), bucket.index(), bucket.is_last()
        is_first = self._latest is None or index <= self._latest  # or a backward broke off
        self._latest = None if is_last else index
        if is_last:
            self.first_step = False
        name = f"step {self._state.step}, bucket {index}"
        arrival = Arrival(buffer, bucket.parameters(), name, is_first, is_last, promise, self._choose(buffer))
        with named(name):
            arrival.receive = arrival.exchange.scatter(buffer)
        return arrival

    def _choose(self, buffer: Tensor) -> Exchange:
        """Return how the bucket travels: by the settings, W and its bytes alone, the same on every rank."""
        exchange, scope = self._state.exchange, self._state.scope
        if exchange == "sketch":
            return self.lane.sketch
        small = self.group.size() * buffer.numel() * buffer.element_size() <= self.lane.small_bytes
        gathers = exchange == "gather" or (exchange == "auto" and scope == "bucket" and small)
        return self.lane.gather if gathers else self.lane.sharded

    def filter(self, arrival: Arrival, in_backward: bool) -> None:
        """Receive a bucket's rows, and decide once a decision is due; on the lane."""
        state = self._state
        with named(arrival.name):
            if arrival.is_first:  # a backward that broke off may have left some behind
                self._waiting, self._decided, self._numbers = [], [], []
                self.land()
                # Before any bucket is handed back, after which the parameters may change. A rank outside of backward
                # is in DDP's Join, and stays as it is while the others train.
                parameters = [each for decision in state._records.decisions for each in decision.parameters]
                hosts = state._records.statistics.hosts
                self._replicas.start(state.step, parameters, self.lane.small_messages, hosts, in_backward)
                if in_backward == self._has_finished:
                    self._has_finished = not in_backward
                    self._finished[0, self.group.rank()] = float(self._has_finished)
            assert arrival.receive is not None
            arrival.rows = arrival.receive()
            arrival.measured = gram(arrival.rows)
            self._waiting.append(arrival)
            if state.scope != "model" or arrival.is_last:
                self._decide()
            if arrival.is_last:
                self._end_step()

    def finish(self) -> None:
        """End the step with backward where DDP may leave out the last bucket; let errors out of `backward()`."""
        if self._latest is not None and self._state._model.leaves_out_buckets is not False:
            self._latest, self.first_step = None, False
            self.lane.run(self._close)
        self.lane.wait()

    def draw(self) -> None:
        """Wait for a comparison of parameters that is on its way; no collective.

        Raises:
            RuntimeError: on every rank: they differ.
        """
        self._replicas.finish()

    def _close(self) -> None:
        """Decide on what waits for a bucket that never came, and end the step."""
        if self._waiting:
            with named(self._waiting[0].name):
                self._decide()
        self._end_step()
        self.land()

    def _decide(self) -> None:
        """Take one decision for every bucket that waits, and start the averages on their way back."""
        state, arrivals = self._state, self._waiting
        self._waiting = []
        weighting = state._weighting_now()
        settings = as_text({**shared(state), "warm-up": state.step < state.start_step})
        measured = [arrival.measured for arrival in arrivals if arrival.measured is not None]
        total = measured[0] if len(measured) == 1 else torch.stack(measured).sum(0)
        summed = arrivals[0].exchange.sum(torch.cat([total, self._fingerprints.own(settings), self._finished]))
        gramian, numbers, (finished,) = summed.split([self.group.size(), 2, 1])
        self._fingerprints.require_same(settings, numbers)
        agreement = replace(decide(gramian, weighting, state.max_norm_ratio), finished=finished != 0)
        self._fingerprints.remember(agreement.weights)
        for arrival in arrivals:
            finish = arrival.exchange.gather(arrival.rows, agreement.weights, arrival.buffer)
            arrival.rows = ()
            if finish is None:
                arrival.promise.set_result(arrival.buffer)
            else:
                self._landing.append((arrival, finish))
        parameters = [parameter for arrival in arrivals for parameter in arrival.parameters]
        self._decided.append(Decision(agreement, parameters))
        self._numbers += numbers.unbind()

    def _end_step(self) -> None:
        state = self._state
        decided, self._decided = self._decided, []
        numbers, self._numbers = self._numbers, []
        step = state.step
        state._end_step()
        state._records.add(step, decided, numbers, state.max_consecutive_skips)

    def land(self) -> None:
        """Wait for every average that is on its way, and hand them to DDP."""
        landing, self._landing = self._landing, []
        for arrival, finish in landing:
            with named(arrival.name):
                finish()
            arrival.promise.set_result(arrival.buffer)
