"""The late way of one model's gradients, whatever engine averages them.

    late.begin()                                      at a step's first bucket: the last ballots' verdict
    shares = late.weigh(gradient, parameters)         sketch += fold(gradient); gradient *= share
    …                                                 the engine adds up gradients and shares
    late.end()                                        after the last bucket: the ballot

`weigh` is `ballot.fold` and `share.scale`, which engines that show a gradient in parts call themselves. All collectives
are the hook's, in the buckets' order, on the gradients' own group. Accelerators count ballots on a side stream.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.alike import fingerprints, require_alike, require_one_replica, shared
from gaf_ddp.ballots.ballot import Numbers, Told, affordable, read
from gaf_ddp.ballots.count import Sent
from gaf_ddp.ballots.opened import OpenBallot
from gaf_ddp.ballots.places import Places
from gaf_ddp.ballots.post import Post
from gaf_ddp.ballots.readings import Readings
from gaf_ddp.ballots.replica import Replica
from gaf_ddp.ballots.share import Share
from gaf_ddp.ballots.verdict import Verdict, draw, watch
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.checks.ballots import BallotChecks
from gaf_ddp.engines.apart import Loss
from gaf_ddp.kernels.fold import Spans, fold
from gaf_ddp.monitor.records import Decision
from gaf_ddp.runtime.backward import number_of_backward
from gaf_ddp.runtime.errors import named
from gaf_ddp.way import Way

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState


class LateFilter(Way):
    """Scales a rank's gradients by the last verdict, and votes for the next one.

    Args:
        state: the settings, the judge, and where records go.
        group: the W ranks that gradients are averaged over.
        device: of the gradients.
        averages: whether the engine divides the sum of the gradients by W. DDP leaves that to its hook.
        in_buckets: whether all ranks see the same buckets in the same order, and the averages; else parts in any order.
            Only with buckets can ranks ask for each other's norms in the first step, and check sums.
        every: steps of a ballot, in place of `state.judge_every`.
        tensor_group: ranks that tensor parallelism spreads parameters over, if it does.
    """

    def __init__(
        self,
        state: "GAFState",
        group: dist.ProcessGroup,
        device: torch.device,
        averages: bool = False,
        in_buckets: bool = True,
        every: int | None = None,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group, self.device, self.wire_dtype = group, device, state.wire_dtype if group.size() > 1 else None
        self._state, self._voters = state, Voters.named(state.voters, state._records.statistics.hosts)
        state._records.statistics.voter_of = None if self._voters.are_ranks else self._voters.of_ranks
        self._in_buckets = in_buckets
        self._replica = Replica.of(state, group, tensor_group)
        self.places = Places() if self._replica is None else Places(self._replica.part, self._replica.parts)
        self.parameters = self.places.parameters  # those whose gradients came, in the order of their places
        self._post = Post(state, group, self._voters, self._replica)
        self.share = Share(state, group, device, averages, asks=in_buckets)
        self.is_open = False  # between a step's first bucket and its last one
        self._latest = -1  # the index of the last bucket
        self._judge_every = every or state.judge_every
        self._every = self._judge_every or 1  # steps of a ballot
        self.readings = Readings(group.rank())
        self.checks = BallotChecks(state, sums=in_buckets and self._replica is None)
        self.ballot = OpenBallot(state.sketch_size, device)
        self.recall()

    def begin_if_first(self, index: int) -> None:
        """Begin a step if a bucket of this index is its first; indices grow in a step."""
        if not self.is_open or index <= self._latest:
            self.begin()
        self._latest = index

    def begin(self) -> None:
        """Begin a step: draw the verdict of the last ballots, and end a step whose last bucket never came."""
        self.end_if_open()
        self.draw()
        self._post.forward()
        if self.share.begin_step():
            self._drop_check()
        self.is_open = True
        self.checks.begin_step(self._state.step, self.ballot.steps == 0, self._every, self.parameters, self.device)

    def weigh(self, gradient: Tensor, parameters: Sequence[Tensor], count: int | None = None) -> tuple[Tensor, Spans]:
        """Fold a bucket's gradient `(N,)` into the ballot, and scale it by this rank's share, in place.

        The parameters, and the count, are as `Places.spans` has them. Returned are the share `(2,)` float64, to be
        added up over the ranks beside the gradient (`kernels.scale`), and the bucket's spans of the model.
        """
        key, spans = self.places.spans(parameters, count)
        square = self.ballot.new_square(key)
        self.ballot.fold(gradient, spans, square)
        if self._replica is not None:
            self._replica.add_square(square)
        return self.share.scale(gradient, key, square), spans

    def vote(self) -> None:
        """Send the ballot if it is full."""
        self.ballot.steps += 1
        if self.ballot.steps >= self._every:
            self._send()

    def fold(self, gradient: Tensor, parameters: Sequence[Tensor], count: int | None = None) -> Tensor:
        """Return the sketch `(k,)` of a gradient `(N,)` of known parameters."""
        return fold(gradient, self.places.spans(parameters, count)[1], self._state.sketch_size)[0]

    def read(self, loss: Loss) -> None:
        """Fold the two gradients of a loss on held-out data, apart from training, for a later ballot."""
        model = None if self._state._model is None else self._state._model.wrapped
        self.readings.read(loss, self.parameters, model, lambda gradient: self.fold(gradient, self.parameters))

    def end(self) -> None:
        """End a step: `vote` and `close`."""
        self.vote()
        self.close()

    def close(self) -> None:
        """Count the step, whose ballot is sent if it was full."""
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
        sent = self._post.take()
        if sent is None:
            return
        with named(f"step {sent.step}"):
            products, held = sent.counting.read()
            numbers = read(held, len(sent.keys))
            require_alike(shared(self._state), numbers.settings, self.group.rank())
            require_one_replica(numbers.unlike)
            self.readings.require(numbers)
            self.checks.require(numbers, sent.step)
        verdict = self._verdict(sent, products, numbers)
        self.checks.compare(sent, numbers, verdict.guarded)
        self.share.set(verdict.kept)
        self.share.limits.set(sent.keys, verdict.limits)
        decision = Decision(verdict.agreement, self.parameters)
        self._state._records.add_read(sent.step, decision, self._state.max_consecutive_skips, sent.steps)

    def _verdict(self, sent: Sent, products: Tensor, numbers: Numbers) -> Verdict:
        judge, longest = self._state._judge, self._state.max_norm_ratio
        if judge is None:
            return watch(self._state._weighting_at(self._state.step), products, numbers, longest)
        limits = self.share.limits.known(sent.keys)
        return draw(judge, products, numbers, self._voters, sent.steps, longest, limits, sent.counted)

    def recall(self) -> None:
        """Begin with what the judge remembers, which has been loaded; everybody counts if that is nothing."""
        kept = None if self._state._judge is None else self._state._judge.kept
        if kept is not None and len(kept) == self._voters.count:
            self.share.set(self._voters.spread(kept))
            self._drop_check()

    def _drop_check(self) -> None:
        """Drop the sums' check where the set of ranks that count changes within a ballot."""
        if self.ballot.steps:
            self.checks.sums = None

    def _send(self) -> None:
        """Send the ballot, and begin another."""
        state, check, counted, squares = self._state, self.checks.sums, self.share.counted(), self.ballot.squares
        finished = self._in_buckets and number_of_backward() is None  # in DDP's Join
        if check is not None and not state.watch and counted[self.group.rank()]:
            check.guard(list(map(torch.stack, squares.values())), self.share.limits.held(squares))
        sketch, loss = self.readings.append_to(self.ballot.sketch)
        waits, settings = self.readings.waiting, fingerprints(shared(state))
        told = Told(finished, settings, self.checks.hash, self.checks.off, waits, loss)
        self._post.send(self.ballot, sketch, told, check, counted)
        if self._judge_every is None:
            gradient = sum(each.numel() * each.element_size() for each in self.parameters)
            self._every = affordable(self.group.size(), state.sketch_size, gradient)
        self.ballot = OpenBallot(state.sketch_size, self.device)
        self.checks.begin_ballot()
