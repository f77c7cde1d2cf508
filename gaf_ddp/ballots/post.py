"""Where ballots are sent from, and kept while they are on their way."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from gaf_ddp.alike import as_text, shared
from gaf_ddp.ballots.ballot import Told, pack
from gaf_ddp.ballots.count import Counting, Sent
from gaf_ddp.ballots.opened import OpenBallot
from gaf_ddp.ballots.readings import split
from gaf_ddp.ballots.replica import Added, Replica
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.checks.sums import SumCheck
from gaf_ddp.kernels.gram import gram
from gaf_ddp.runtime.collectives import all_gather_single
from gaf_ddp.runtime.leaving import arrives_before_the_end

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState


class Post:
    """Sends one rank's ballots; on accelerators they are counted behind backward, and nobody waits for them now.

    Args:
        state: the settings and the judge.
        group: the W ranks.
        voters: who vote together.
        replica: what this rank is a part of, if it has no whole model.
    """

    def __init__(self, state: "GAFState", group: dist.ProcessGroup, voters: Voters, replica: Replica | None) -> None:
        self._state, self._group, self._voters, self._replica = state, group, voters, replica
        self._sent: Sent | None = None
        self._added: tuple[Added, Callable[..., None]] | None = None  # over the replica, and what sends it on then
        arrives_before_the_end(self)

    def send(self, ballot: OpenBallot, sketch: Tensor, told: Told, check: SumCheck | None, counted: Tensor) -> None:
        """Send a ballot that is full to the other ranks, or first to those that hold the rest of this replica.

        Args:
            ballot: that is full.
            sketch: `(k,)`, its own, or `(3 k,)`, behind it those of held-out data.
            told: what it says beside the gradient.
            check: of the averages of its steps, if those are checked.
            counted: bool `(W,)`, who counted in them.
        """
        squares = ballot.summed()
        gather = partial(self._gather, ballot, told, check, counted, self._state.step, squares)
        if self._replica is None:
            gather(sketch, squares.sum(), None)
            return
        words = f"{as_text(shared(self._state))} {counted.tolist()}"
        self._added = self._replica.add_up(sketch, squares.sum(), words), gather

    def forward(self) -> None:
        """Send on what was added up over the replica, whose ranks have all ended that step by now."""
        if self._added is not None:
            (added, gather), self._added = self._added, None
            gather(*added.wait())

    def take(self) -> Sent | None:
        """Return what was sent, once."""
        sent, self._sent = self._sent, None
        return sent

    def on_the_way(self) -> list[dist.Work]:
        """Return the works on CPU groups that may not be done; accelerators' streams end by themselves."""
        works = []
        if self._sent is not None and self._sent.counting.work is not None:
            works.append(self._sent.counting.work)
        if self._added is not None and self._added[0].sums.device.type == "cpu":
            works.append(self._added[0].work)
        return works

    def _gather(
        self,
        ballot: OpenBallot,
        told: Told,
        check: SumCheck | None,
        counted: Tensor,
        step: int,
        squares: Tensor,
        sketch: Tensor,
        total: Tensor,
        unlike: Tensor | None,
    ) -> None:
        own = pack(sketch, squares, total, unlike, told)
        rows = own.new_empty(self._group.size(), len(own))
        work = all_gather_single(rows.view(-1), own, group=self._group, async_op=True)

        def tally(found: Tensor) -> Tensor:
            sketches, readings = split(found, self._state.sketch_size)
            if check is not None:
                check.expect(sketches, counted)
            voting, judge = self._voters.mean(sketches), self._state._judge
            return gram(voting) if judge is None else judge.tally(voting, ballot.steps, readings)

        counting = Counting(work, own, rows, len(sketch), tally)
        self._sent = Sent(step, ballot.steps, list(ballot.squares), counted, check, counting)
