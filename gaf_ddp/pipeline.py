"""Buckets on their way: out of DDP's hands, through an exchange, to a decision, and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.agreement import Agreement
from gaf_ddp.errors import named
from gaf_ddp.exchange import Exchange
from gaf_ddp.gramian import Rows
from gaf_ddp.judges import Judge
from gaf_ddp.lanes import Promise, open_lane
from gaf_ddp.settings import Fingerprints


@dataclass(eq=False)
class Arrival:
    """One bucket between its arrival and its average; of a GradBucket, only what outlives the hook's call."""

    buffer: Tensor  # (N,), DDP's own memory, where the result goes
    parameters: list[Tensor]
    step: int
    index: int  # of the bucket, in this step
    is_first: bool  # of its step
    is_last: bool
    promise: Promise
    exchange: Exchange
    receive: Callable[[], Rows] | None = None  # waits for the rows (W, n)
    averaging: Callable[[], None] | None = None  # waits for the average, where it is on its way before any verdict
    rows: Rows = ()
    measured: Tensor | None = None  # (W, W) float64, or with rows below

    @property
    def key(self) -> tuple[int, ...]:
        """What the bucket is about: DDP may lay its buckets out anew, so an index would not do."""
        return tuple(map(id, self.parameters))

    @property
    def name(self) -> str:
        """Which bucket it is, for what goes wrong."""
        return f"step {self.step}, bucket {self.index}"


class Decision(NamedTuple):
    """One decision and the parameters it was about."""

    agreement: Agreement
    parameters: list[Tensor]


class Way(Protocol):
    """What a state knows of the way its model's gradients take."""

    group: dist.ProcessGroup
    judge: Judge


class Pipeline:
    """The way of one model's buckets, from the first one on; a bucket passes its methods in their order here."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        scope: str,
        exchange: str,
        wire_dtype: torch.dtype | None,
        sketch_size: int,
        watch: bool,
        judge: Judge,
    ) -> None:
        self.group, self.device, self.judge = group, device, judge
        self.lane = open_lane(group, device, wire_dtype, sketch_size)
        self._scope, self._exchange, self._watch = scope, exchange, watch
        self.first_step = True
        self._latest: int | None = None  # the index of the last bucket taken, None between steps
        self._waiting: list[Arrival] = []  # for a decision
        self._landing: list[tuple[Arrival, Callable[[], None]]] = []  # their averages are on their way
        self._decided: list[tuple[Decision, Tensor]] = []  # in this step, with the numbers of the ranks' settings
        self._fingerprints = Fingerprints(self.lane.group, device)

    def close(self) -> bool:
        """Take no more buckets for this step; return whether its last one never came."""
        latest, self._latest = self._latest, None
        self.first_step = False
        return latest is not None

    def take(self, bucket: Any, step: int) -> Arrival:
        """Start a bucket on its way.

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
        exchange = self._choose(buffer)
        arrival = Arrival(buffer, bucket.parameters(), step, index, is_first, is_last, promise, exchange)
        with named(arrival.name):
            arrival.receive = exchange.scatter(buffer)
            if self._watch and exchange is self.lane.sketch and exchange.is_aside:
                arrival.averaging = exchange.average(buffer)  # everyone counts, whatever the verdict will be
        return arrival

    def _choose(self, buffer: Tensor) -> Exchange:
        """Return how the bucket travels: by the settings, W and its bytes alone, the same on every rank."""
        if self._exchange == "sketch":
            return self.lane.sketch
        small = self.group.size() * buffer.numel() * buffer.element_size() <= self.lane.small_bytes
        gathers = self._exchange == "gather" or (self._exchange == "auto" and self._scope == "bucket" and small)
        return self.lane.gather if gathers else self.lane.sharded

    def measure(self, arrival: Arrival) -> list[Arrival]:
        """Receive a bucket's rows and take their inner products; return all that are to be decided on now."""
        if arrival.is_first:  # a backward that broke off may have left some behind
            self._waiting, self._decided = [], []
            self.land()
        assert arrival.receive is not None
        rows = arrival.rows = arrival.receive()
        if self._watch:
            self._start_landing(arrival, arrival.averaging or self.lane.sketch.average(arrival.buffer))
        arrival.measured = self.judge.measure(arrival.key, rows)
        self._waiting.append(arrival)
        return self.due() if self._scope != "model" or arrival.is_last else []

    def due(self) -> list[Arrival]:
        """Return the buckets that wait for a decision, which is taken now."""
        due, self._waiting = self._waiting, []
        return due

    def sum(self, arrivals: list[Arrival], settings: str) -> tuple[Tensor, Tensor]:
        """Return the sum over buckets and ranks of what was measured, and the numbers `(W,)` of their settings.

        Raises:
            ValueError: on the CPU, settings differ between the ranks; on accelerators the numbers tell later.
        """
        measured = [arrival.measured for arrival in arrivals if arrival.measured is not None]
        total = measured[0] if len(measured) == 1 else torch.stack(measured).sum(0)
        summed = arrivals[0].exchange.sum(torch.cat([total, self._fingerprints.own(settings)]))
        self._fingerprints.require_same(settings, summed[-1])
        return summed[:-1], summed[-1]

    def send(self, arrivals: list[Arrival], agreement: Agreement, numbers: Tensor) -> None:
        """Average the rows by the weights and start the averages on their way back."""
        for arrival in arrivals:
            if not self._watch:
                finish = arrival.exchange.gather(arrival.rows, agreement.weights, arrival.buffer)
                self._start_landing(arrival, finish)
            arrival.rows = ()
        parameters = [parameter for arrival in arrivals for parameter in arrival.parameters]
        self._decided.append((Decision(agreement, parameters), numbers))

    def _start_landing(self, arrival: Arrival, finish: Callable[[], None] | None) -> None:
        if finish is None:
            arrival.promise.set_result(arrival.buffer)
        else:
            self._landing.append((arrival, finish))

    def end_step(self) -> list[tuple[Decision, Tensor]]:
        """Return what was decided in this step, and forget what only it needed."""
        self.judge.finish()
        decided, self._decided = self._decided, []
        return decided

    def land(self) -> None:
        """Wait for every average that is on its way, and hand them to DDP."""
        landing, self._landing = self._landing, []
        for arrival, finish in landing:
            with named(arrival.name):
                finish()
            arrival.promise.set_result(arrival.buffer)
