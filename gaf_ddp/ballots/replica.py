"""Ranks that hold one replica's model between them: one ballot, and one verdict, for all of them.

Each folds its own part, at places of its own. When a ballot is full its sketch and squared norm are added up over the
replica, and nobody waits: the stages of a pipeline end their steps at other times. The sum goes to the other replicas
when the next step begins, and its verdict holds from the step after that: two steps late.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.alike import fingerprint
from gaf_ddp.settings import require

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState


class Replica:
    """One rank's part of a replica.

    Args:
        group: the ranks that hold it.
        tensor_group: those of them that tensor parallelism spreads parameters over; None if it does not.

    Attributes:
        part: this rank's.
        parts: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup, tensor_group: dist.ProcessGroup | None) -> None:
        self._group, self._tensor_group = group, tensor_group
        self.part, self.parts = group.rank(), group.size()

    @classmethod
    def of(
        cls, state: "GAFState", group: dist.ProcessGroup, tensor_group: dist.ProcessGroup | None
    ) -> "Replica | None":
        """Return the replica that the state names beside the W ranks of a group; None if each rank has a whole one.

        Raises:
            ValueError: it lacks ranks that tensor parallelism spreads parameters over, or has some that gradients
                are averaged over.
        """
        own = state.replica_group
        if own is None:
            return None
        ranks = dist.get_process_group_ranks(own)
        both = sorted({*ranks} & {*dist.get_process_group_ranks(group)} - {dist.get_rank()})
        require(not both, "replica_group must have no other rank of those that gradients are averaged over", both)
        if tensor_group is not None:
            spread = dist.get_process_group_ranks(tensor_group)
            rule = f"replica_group must hold the ranks {spread} that tensor parallelism spreads parameters over"
            require({*spread} <= {*ranks}, rule, ranks)
            tensor_group = own if {*spread} == {*ranks} else tensor_group  # the model's own is busy in backward
        return cls(own, tensor_group)

    def add_square(self, square: Tensor) -> None:
        """Add up a bucket's squared norm over tensor parallel ranks: what is replicated there must be scaled alike.

        Those go through the same buckets at the same time. Stages of a pipeline do not, and would wait for ever.
        """
        if self._tensor_group is not None:
            dist.all_reduce(square, group=self._tensor_group)

    def add_up(self, sketch: Tensor, total: Tensor, told: str) -> "Added":
        """Begin to add up a ballot's sketch `(k,)` and squared norm `()`; told is what all ranks must have alike."""
        shared = 1 if self._tensor_group is None else self._tensor_group.size()
        digest = fingerprint(told) % 2**32  # so that any sum of them is exact
        own = torch.cat([sketch.double(), torch.stack([total / shared, torch.full_like(total, digest)])])
        work = dist.all_reduce(own, group=self._group, async_op=True)
        return Added(work, own, digest * self.parts)


class Added(NamedTuple):
    """A replica's ballot on its way to being added up."""

    work: Any
    sums: Tensor
    expected: float

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sketch `(k,)` and squared norm `()`, and how far `()` what was told is from being alike."""
        self.work.wait()
        return self.sums[:-2].float(), self.sums[-2], self.sums[-1] - self.expected
