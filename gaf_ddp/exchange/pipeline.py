"""The way of a bucket at once: through an exchange, to a decision, and back, all of it inside the hook."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gaf_ddp.alike import Fingerprints, as_text, shared
from gaf_ddp.checks.replicas import ReplicaCheck
from gaf_ddp.exchange.gather import GatherExchange
from gaf_ddp.exchange.protocol import Exchange
from gaf_ddp.exchange.sharded import ShardedExchange
from gaf_ddp.exchange.sketched import SketchExchange
from gaf_ddp.exchange.stream import SideStream
from gaf_ddp.kernels.gram import gram
from gaf_ddp.monitor.records import Decision
from gaf_ddp.rules.agreement import decide
from gaf_ddp.runtime.backward import at_end_of_backward
from gaf_ddp.runtime.device import on_host, require_device
from gaf_ddp.runtime.errors import named
from gaf_ddp.way import Way

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState

# In all ranks' buckets on accelerators, up to which latency is a bucket's time (not measured yet). On the CPU gathering
# never won.
_SMALL_BYTES = 65_536


class Arrival(NamedTuple):
    """One bucket that waits for a decision; of a GradBucket, only what outlives the hook's call."""

    buffer: Tensor  # (N,), DDP's own memory, where the result goes
    parameters: list[Tensor]
    exchange: Exchange
    rows: Tensor  # (W, n)
    measured: Tensor  # (W, W) float64
    future: Future[Tensor]  # of the buffer


class Pipeline(Way):
    """The way of one model's buckets, from the first one on.

    What is sent is sent in the buckets' order, on DDP's own group, whose own collectives come before a step's first
    bucket and after its last one. On the CPU the hook waits for it; on accelerators it is enqueued on a side stream.

    Args:
        state: the settings, and where records go.
        group: the W ranks that gradients are averaged over.
        device: of the buckets.
    """

    def __init__(self, state: "GAFState", group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        wire_dtype = state.wire_dtype if group.size() > 1 else None  # nothing travels
        self._gather, self._sharded = GatherExchange(group, wire_dtype), ShardedExchange(group, wire_dtype)
        self._sketch = SketchExchange(group, state.sketch_size, wire_dtype)
        self._stream = SideStream(device)
        self._state = state
        self._latest: int | None = None  # the index of the last bucket taken, None between steps
        self._waiting: list[Arrival] = []  # for a decision
        self._decided: list[Decision] = []  # in this step
        self._numbers: list[Tensor] = []  # of the settings and weights that each rank decided by
        self._fingerprints = Fingerprints(group, device)
        self._has_finished = False  # this rank, which waits for the others in DDP's Join
        self._finished = torch.zeros(1, group.size(), dtype=torch.float64, device=device)  # the same, in its column
        self._replicas = ReplicaCheck(state.check_every)

    @property
    def is_open(self) -> bool:
        """Whether this is between a step's first bucket and its last one."""
        return self._latest is not None

    def take(self, bucket: Any) -> Future[Tensor]:
        """Exchange a bucket, decide once a decision is due, and write the average into the bucket.

        Returns:
            A future of the bucket's buffer, done in bucket scope; in model scope it is done with the last bucket.

        Raises:
            ValueError: it is on another device than the first one, the ranks' settings differ, or the weighting
                returned something invalid.
            RuntimeError: a rank is gone, or replicas differ; names step and bucket.
        """
        buffer: Tensor = bucket.buffer()
        require_device(buffer, self.device)
        in_backward = at_end_of_backward(self._finish)
        index, is_last = bucket.index(), bucket.is_last()
        is_first = self._latest is None or index <= self._latest  # or a backward broke off
        self._latest = None if is_last else index
        future, exchange = self._stream.future(), self._choose(buffer)
        with named(f"step {self._state.step}, bucket {index}"), self._stream.behind_backward():
            if is_first:
                self._begin_step(in_backward)
            rows = exchange.scatter(buffer)
            self._waiting.append(Arrival(buffer, bucket.parameters(), exchange, rows, gram(rows), future))
            if self._state.scope != "model" or is_last:
                self._decide()
            if is_last:
                self._end_step()
        return future

    def draw(self) -> None:
        """Wait for a comparison of parameters that is on its way; no collective.

        Raises:
            RuntimeError: on every rank: they differ.
        """
        self._replicas.finish()

    def _choose(self, buffer: Tensor) -> Exchange:
        """Return how the bucket travels: by the settings, W and its bytes alone, the same on every rank."""
        exchange, scope = self._state.exchange, self._state.scope
        if exchange == "sketch":
            return self._sketch
        everyones = self.group.size() * buffer.numel() * buffer.element_size()
        small = everyones <= _SMALL_BYTES and not on_host(buffer)
        gathers = exchange == "gather" or (exchange == "auto" and scope == "bucket" and small)
        return self._gather if gathers else self._sharded

    def _begin_step(self, in_backward: bool) -> None:
        """Forget what a backward that broke off left behind, and compare parameters if it is time to.

        A rank outside of backward is in DDP's Join, and stays as it is while the others train.
        """
        self._waiting, self._decided, self._numbers = [], [], []
        records = self._state._records
        parameters = [each for decision in records.decisions for each in decision.parameters]
        self._replicas.start(self._state.step, parameters, self.group, records.statistics.hosts, in_backward)
        if in_backward == self._has_finished:
            self._has_finished = not in_backward
            self._finished[0, self.group.rank()] = float(self._has_finished)

    def _decide(self) -> None:
        """Take one decision for every bucket that waits, and write their averages."""
        state, arrivals = self._state, self._waiting
        self._waiting = []
        weighting = state._weighting_at(state.step)
        settings = as_text({**shared(state), "warm-up": state.step < state.start_step})
        measured = [arrival.measured for arrival in arrivals]
        total = measured[0] if len(measured) == 1 else torch.stack(measured).sum(0)
        summed = arrivals[0].exchange.sum(torch.cat([total, self._fingerprints.own(settings), self._finished]))
        gramian, numbers, (finished,) = summed.split([self.group.size(), 2, 1])
        self._fingerprints.require_same(settings, numbers)
        agreement = replace(decide(gramian, weighting, state.max_norm_ratio), finished=finished != 0)
        self._fingerprints.remember(agreement.weights)
        for arrival in arrivals:
            arrival.exchange.gather(arrival.rows, agreement.weights, arrival.buffer)
            arrival.future.set_result(arrival.buffer)
        parameters = [parameter for arrival in arrivals for parameter in arrival.parameters]
        self._decided.append(Decision(agreement, parameters))
        self._numbers += numbers.unbind()

    def _end_step(self) -> None:
        state, step = self._state, self._state.step
        decided, self._decided = self._decided, []
        numbers, self._numbers = self._numbers, []
        state._end_step()
        state._records.add(step, decided, numbers, state.max_consecutive_skips)

    def _finish(self) -> None:
        """End the step with backward where DDP may leave out the last bucket."""
        if self._latest is None or self._state._model.leaves_out_buckets is False:
            return
        self._latest = None
        with named(f"step {self._state.step}"), self._stream.behind_backward():
            if self._waiting:
                self._decide()
            self._end_step()
