"""The late way of one model's gradients, whatever engine averages them.

    late.begin()                                      at a step's first bucket: the last ballots' verdict
    shares = late.weigh(gradient, parameters)         sketch += fold(gradient); gradient *= share
    …                                                 the engine adds up gradients and shares
    late.end()                                        after the last bucket: the ballot

`weigh` is `fold` and `share.scale`, which engines that show a gradient in parts call themselves.

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
from gaf_ddp.ballots.places import Key, Places
from gaf_ddp.ballots.share import Share
from gaf_ddp.ballots.verdict import Verdict, draw, watch
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.checks.ballots import BallotChecks
from gaf_ddp.kernels.fold import Spans, fold_into
from gaf_ddp.kernels.gram import gram
from gaf_ddp.monitor.records import Decision
from gaf_ddp.runtime.collectives import all_gather_single
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
        in_buckets: whether ranks bring the same buckets in the same order, and their averages come back; else parts
            in any order. Only then can ranks ask for each other's norms in the first step, and check sums.
        every: steps of a ballot, whatever the state says.
    """

    def __init__(
        self,
        state: "GAFState",
        group: dist.ProcessGroup,
        device: torch.device,
        averages: bool = False,
        in_buckets: bool = True,
        every: int | None = None,
    ) -> None:
        self.group, self.device, self.wire_dtype = group, device, state.wire_dtype if group.size() > 1 else None
        self._state, self._hosts = state, state._records.statistics.hosts
        self._voters = Voters.named(state.voters, self._hosts)
        self._in_buckets = in_buckets
        self.places, self.share = Places(), Share(state, group, device, averages, asks=in_buckets)
        self.is_open = False  # between a step's first bucket and its last one
        self._latest = -1  # the index of the last bucket
        self._sent: Sent | None = None
        self._judge_every = every or state.judge_every
        self._every = self._judge_every or 1  # steps of a ballot
        self.checks = BallotChecks(state.check_every, state.sketch_size, self._hosts, sums=in_buckets)
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
        if self.share.begin_step():
            self._drop_check()
        self.is_open = True
        self.checks.begin_step(self._state.step, self._steps == 0, self._every, self.places.parameters, self.device)

    def weigh(self, gradient: Tensor, parameters: Sequence[Tensor], count: int | None = None) -> tuple[Tensor, Spans]:
        """Fold a bucket's gradient `(N,)` into the ballot, and scale it by this rank's share, in place.

        The parameters, and the count, are as `Places.spans` has them. Returned are the share `(2,)` float64, to be
        added up over the ranks beside the gradient (`kernels.scale`), and the bucket's spans of the model.
        """
        key, spans = self.places.spans(parameters, count)
        square = self.new_square(key)
        self.fold(gradient, spans, square)
        return self.share.scale(gradient, key, square), spans

    def new_square(self, key: Key) -> Tensor:
        """Return what a bucket's squared norm of this step is added up in, `()` float64; it is in the ballot."""
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        self._squares.setdefault(key, []).append(square)
        return square

    def fold(self, gradient: Tensor, spans: Spans, square: Tensor) -> None:
        """Fold a part of a bucket's gradient `(N,)` into the ballot, and add its squared norm to that."""
        fold_into(gradient, spans, self._sketch, square)

    def vote(self) -> None:
        """Send the ballot if it is full."""
        self._steps += 1
        if self._steps >= self._every:
            self._send()

    def end(self) -> None:
        """End a step, and send the ballot if it is full."""
        self.vote()
        self.close()

    def close(self) -> None:
        """End a step whose ballot is sent."""
        self.is_open = False
        self._state._end_step()

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
            self.checks.require(numbers, sent.step)
        verdict = self._verdict(sent, products, numbers)
        self.checks.compare(sent, numbers, verdict.guarded)
        self.share.set(verdict.kept)
        self.share.limits.set(sent.keys, verdict.limits)
        decision = Decision(verdict.agreement, self.places.parameters)
        self._state._records.add_read(sent.step, decision, self._state.max_consecutive_skips)

    def _verdict(self, sent: Sent, products: Tensor, numbers: Numbers) -> Verdict:
        state = self._state
        if state._judge is None:
            return watch(state._weighting_now(), products, numbers, state.max_norm_ratio)
        held = sent.steps, state.max_norm_ratio, self.share.limits.known(sent.keys), sent.counted
        return draw(state._judge, products, numbers, self._voters, *held)

    def recall(self) -> None:
        """Begin with what the judge remembers, which has been loaded; everybody counts if that is nothing."""
        kept = None if self._state._judge is None else self._state._judge.kept
        if kept is not None and len(kept) == self._voters.count:
            self.share.set(self._voters.spread(kept))
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
        state, steps, check, counted = self._state, self._steps, self.checks.sums, self.share.counted()
        squares = [torch.stack(each).sum() if len(each) > 1 else each[0] for each in self._squares.values()]
        # Outside of backward DDP calls its hook in Join alone.
        finished = self._in_buckets and torch._C._current_graph_task_id() == -1
        if check is not None and not state.watch and counted[self.group.rank()]:
            check.guard(list(map(torch.stack, self._squares.values())), self.share.limits.held(self._squares))
        own = pack(
            self._sketch, squares, Told(finished, fingerprints(shared(state)), self.checks.hash, self.checks.off)
        )
        rows = own.new_empty(self.group.size(), len(own))
        work = all_gather_single(rows.view(-1), own, group=self.group, async_op=True)

        def tally(sketches: Tensor) -> Tensor:
            if check is not None:
                check.expect(sketches, counted)
            voting = self._voters.mean(sketches)
            return gram(voting) if state._judge is None else state._judge.tally(voting, steps)

        counting = Counting(work, own, rows, state.sketch_size, tally)
        self._sent = Sent(state.step, steps, list(self._squares), counted, check, counting)
        if self._judge_every is None:
            gradient = sum(each.numel() * each.element_size() for each in self.places.parameters)
            self._every = affordable(self.group.size(), state.sketch_size, gradient)
        self._begin_ballot()
