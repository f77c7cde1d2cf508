"""The late way of one model's gradients, whatever engine averages them.

    late.begin()                                      at a step's first bucket: the last ballots' verdict
    shares = late.weigh(gradient, parameters)         sketch += fold(gradient); gradient *= share
    …                                                 the engine adds up gradients and shares
    late.end()                                        after the last bucket: the ballot

No thread and no group of its own: what it sends, it sends in the hook, in the buckets' order, on the group that
gradients are averaged over. Accelerators count ballots on a stream beside. The host waits for the last ballots alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.alike import fingerprints, require_alike, shared
from gaf_ddp.ballots.ballot import Numbers, Told, affordable, pack, read
from gaf_ddp.ballots.count import Counting, Sent
from gaf_ddp.ballots.limits import Limits
from gaf_ddp.ballots.places import Key, Places
from gaf_ddp.ballots.references import References, split
from gaf_ddp.ballots.verdict import Verdict, draw, watch
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.checks.ballots import BallotChecks
from gaf_ddp.engines.apart import Loss, gradient_of
from gaf_ddp.kernels.fold import Spans, fold
from gaf_ddp.kernels.gram import gram
from gaf_ddp.kernels.scale import scale
from gaf_ddp.monitor.records import Decision
from gaf_ddp.rules.reference import TEMPERATURES
from gaf_ddp.runtime.collectives import all_gather_single
from gaf_ddp.runtime.device import to_device
from gaf_ddp.runtime.errors import named

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState


class LateFilter:
    """Scales a rank's gradients by the last verdict, and votes for the next one.

    Args:
        state: the settings, the judge, and where records go.
        group: the W ranks that gradients are averaged over.
        device: of the gradients.
        averages: whether the engine itself divides by W what it adds up, or DDP, which leaves that to its hook.
    """

    def __init__(
        self, state: "GAFState", group: dist.ProcessGroup, device: torch.device, averages: bool = False
    ) -> None:
        self.group, self.device, self.wire_dtype = group, device, state.wire_dtype if group.size() > 1 else None
        self._state, self._hosts = state, state._records.statistics.hosts
        self._voters = Voters.named(state.voters, self._hosts)
        state._records.statistics.voter_of = None if self._voters.are_ranks else self._voters.of_ranks
        self._unit, self._places = group.size() if averages else 1, Places()  # what shares add up to; of elements
        self.is_open = False  # between a step's first bucket and its last one
        self._equal_share = torch.tensor([self._unit / group.size(), 0.0], dtype=torch.float64).to(device)
        self._latest = -1  # the index of the last bucket
        self._sent: Sent | None = None
        self._kept = torch.ones(group.size(), dtype=torch.bool)
        self._limits = Limits(group, device)
        self._every = state.judge_every or 1  # steps of a ballot
        self._mode: tuple[bool, bool] | None = None
        self.references = References()
        self.checks = BallotChecks(state.check_every, state.sketch_size, self._hosts)
        self._begin_ballot()
        self.recall()

    def begin_if_first(self, index: int) -> None:
        """Begin a step if a bucket of this index, which grows in a step, is its first."""
        if not self.is_open or index <= self._latest:
            self.begin()
        self._latest = index

    def begin(self) -> None:
        """Begin a step: draw the verdict of the last ballots, and end a step whose last bucket never came."""
        self.end_if_open()
        self.draw()
        state = self._state
        if self._mode != (state.watch, state.step < state.start_step):  # else nothing has changed
            self._mode = state.watch, state.step < state.start_step
            self._drop_check()
            self._by = self._divisor()
        self.is_open = True
        self.checks.begin_step(state.step, self._steps == 0, self._every, self.parameters, self.device)

    def weigh(self, gradient: Tensor, parameters: Sequence[Tensor], count: int | None = None) -> tuple[Tensor, Spans]:
        """Fold a bucket's gradient `(N,)` into the ballot, and scale it by this rank's share, in place.

        The parameters, and the count, are as `Places.spans` has them. Returned are the share `(2,)` float64, to be
        added up over the ranks beside the gradient (`kernels.scale`), and the bucket's spans of the model.
        """
        key, spans = self._places.spans(parameters, count)
        sketch, square = fold(gradient, spans, self._state.sketch_size)
        self._sketch += sketch
        self._squares.setdefault(key, []).append(square)
        limit = self._limits.of(key, square, self._state.max_norm_ratio)
        if self._state.watch or self.group.size() == 1:
            if self._unit == 1:
                gradient.div_(self.group.size())  # as torch's `allreduce_hook`; what is not finite passes
            return self._equal_share.clone(), spans
        return scale(gradient, square, self._by, limit), spans

    def fold(self, gradient: Tensor, parameters: Sequence[Tensor], count: int | None = None) -> Tensor:
        """Return the sketch `(k,)` of a gradient `(N,)` of parameters whose training gradients came before."""
        return fold(gradient, self._places.spans(parameters, count)[1], self._state.sketch_size)[0]

    def read(self, loss: Loss) -> None:
        """Fold the two gradients of a loss on held-out data, apart from training, for a later ballot."""
        model = None if self._state._model is None else self._state._model.wrapped
        found = [gradient_of(loss, t, self.parameters, model, self.device) for t in TEMPERATURES]
        self.references.put([self.fold(gradient, self.parameters) for gradient, _ in found], found[-1][1])

    def end(self) -> None:
        """End a step, and send the ballot if it is full."""
        self.is_open = False
        self._steps += 1
        if self._steps >= self._every:
            self._send()
        self._state._end_step()

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters whose gradients came, in the order of their places."""
        return self._places.parameters

    def end_if_open(self) -> None:
        """End a step whose last bucket never came."""
        if self.is_open:
            self.end()

    def draw(self) -> None:
        """Wait for the ballots that were sent, and let their verdict hold from now on; no collective.

        Raises:
            ValueError: on every rank: their settings differ.
            RuntimeError: on every rank: their parameters differ, or an average was not that of the gradients.
        """
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        with named(f"step {sent.step}"):
            products, held = sent.counting.read()
            numbers = read(held, len(sent.keys))
            require_alike(shared(self._state), numbers.settings, self.group.rank())
            self.references.require(numbers)
            self.checks.require(numbers, sent.step)
        verdict = self._verdict(sent, products, numbers)
        self.checks.compare(sent, numbers, verdict.guarded)
        self._kept = verdict.kept
        self._by = self._divisor()
        self._limits.set(sent.keys, verdict.limits)
        decision = Decision(verdict.agreement, self.parameters)
        self._state._records.add_read(sent.step, decision, self._state.max_consecutive_skips, sent.steps)

    def _verdict(self, sent: Sent, products: Tensor, numbers: Numbers) -> Verdict:
        state = self._state
        if state._judge is None:
            return watch(state._weighting_now(), products, numbers, state.max_norm_ratio)
        held = sent.steps, state.max_norm_ratio, self._limits.known(sent.keys), sent.counted
        return draw(state._judge, products, numbers, self._voters, *held)

    def _counted(self) -> Tensor:
        """Return who counts in this step, bool `(W,)`."""
        everyone = self._state.watch or self._state.step < self._state.start_step
        return torch.ones_like(self._kept) if everyone else self._kept

    def _divisor(self) -> Tensor:
        """Return `()` on the device, how many ranks count now, or which part of W; 0 where this one does not."""
        counted = self._counted()
        number = float(counted.sum()) / self._unit if counted[self.group.rank()] else 0.0
        return to_device(torch.tensor(number, dtype=torch.float64), self.device)

    def recall(self) -> None:
        """Begin with what the judge remembers, which has been loaded; everybody counts if that is nothing."""
        kept = None if self._state._judge is None else self._state._judge.kept
        if kept is not None and len(kept) == self._voters.count:
            self._kept = self._voters.spread(kept)
            self._mode = None
            self._drop_check()

    def _drop_check(self) -> None:
        """Check no sum of a ballot in the midst of which changes who counts."""
        if self._steps:
            self.checks.sums = None

    def _begin_ballot(self) -> None:
        self._sketch = torch.zeros(self._state.sketch_size, dtype=torch.float32, device=self.device)
        self._squares: dict[Key, list[Tensor]] = {}  # of each bucket, one a step
        self._steps = 0
        self.checks.begin_ballot()

    def _send(self) -> None:
        """Send the ballot; on accelerators it is counted behind backward, and nobody waits for it now."""
        state, steps, check, counted = self._state, self._steps, self.checks.sums, self._counted()
        squares = [torch.stack(each).sum() if len(each) > 1 else each[0] for each in self._squares.values()]
        finished = torch._C._current_graph_task_id() == -1  # outside of backward a hook is called in Join alone
        if check is not None and not state.watch and counted[self.group.rank()]:
            check.guard(list(map(torch.stack, self._squares.values())), self._limits.held(self._squares))
        sketch, loss = self.references.append_to(self._sketch)
        waits, settings = self.references.is_waiting, fingerprints(shared(state))
        own = pack(sketch, squares, Told(finished, settings, self.checks.hash, self.checks.off, waits, loss))
        rows = own.new_empty(self.group.size(), len(own))
        work = all_gather_single(rows.view(-1), own, group=self.group, async_op=True)

        def tally(found: Tensor) -> Tensor:
            sketches, readings = split(found, state.sketch_size)
            if check is not None:
                check.expect(sketches, counted)
            voting = self._voters.mean(sketches)
            return gram(voting) if state._judge is None else state._judge.tally(voting, steps, readings)

        counting = Counting(work, own, rows, len(sketch), tally)
        self._sent = Sent(state.step, steps, list(self._squares), counted, check, counting)
        if state.judge_every is None:
            gradient = sum(each.numel() * each.element_size() for each in self.parameters)
            self._every = affordable(self.group.size(), state.sketch_size, gradient)
        self._begin_ballot()
