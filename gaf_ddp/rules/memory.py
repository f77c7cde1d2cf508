"""The consensus rule with a memory: voters judged by their momenta, m ← 0.99 m + g.

One batch's distances are mostly noise, those of momenta are less so. Beside the rule of consensus.py, a ballot does
four things, all by matrices `(V, V)`:

- Momenta are kept relative to the consensus: the members' mean is subtracted, which changes no distance. So a voter
  without a gradient now keeps its place among the others, fading, and is judged by that when it comes back. And
  float32 holds distances that are small beside what the voters have in common.
- Momenta of voters that are very far are drawn in, m_j ← mean + (m_j − mean) · 5/z_j if z_j > 5, so that the effect
  of one burst of long gradients fades within a hundred steps. One that is not finite becomes the mean. The mean is
  that of the members without j.
- Voters whose gradients have been equal for ten steps in a row read the same data, or one copies the other. They are
  one voter for the members, so that copies cannot outvote the others.
- Voters that turn their gradient's sign are found by the gradients' mean cosines (decay 0.98): where gradients
  average to little, momenta do not show it. The mean of two voters is over the steps in which both voted. It counts
  as 0 until these are 50.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gaf_ddp.rules.consensus import distances
from gaf_ddp.rules.medians import lower_median
from gaf_ddp.rules.weighting import cosine

MOMENTUM = 0.99  # per step; 0.97 to 0.995 do the same
_REACH = 5.0  # z beyond which momenta are drawn in
_DECAY, _STEPS = 0.98, 50  # of mean cosines, and the steps that two voters share before theirs counts
_SAME, _ALIKE = 1e-12, 10  # largest relative squared distance of equal gradients; steps in a row until they are copies
_ENOUGH = (1 - _DECAY ** (_STEPS - 0.5)) / (1 - _DECAY)  # their decayed number, less half a step for rounding


class Judgement(NamedTuple):
    """What the rule says of V voters, on the host; float64 where nothing else is said.

    Attributes:
        z: `(V,)`, distance to the consensus in its members' median distance; NaN where there is no gradient now,
            no finite momentum, or nobody to be compared with.
        flipped: bool `(V,)`, its mirror image would be a member.
        equal: bool `(V, V)`, whose gradients have been equal for ten steps in a row.
        moves: `(V, V)`; momenta become `moves @ momenta` before the next gradients are added.
    """

    z: Tensor
    flipped: Tensor
    equal: Tensor
    moves: Tensor


class ConsensusMemory:
    """What the rule remembers beside the momenta.

    Attributes:
        cosines: `(2, V, V)`, decayed sums of the gradients' cosines, and their numbers.
        equal: `(V, V)`, for how many steps in a row gradients have been equal.
    """

    def __init__(self) -> None:
        self.cosines = torch.zeros(2, 0, 0, dtype=torch.float64)
        self.equal = torch.zeros(0, 0, dtype=torch.float64)

    def judge(self, momenta: Tensor, gradients: Tensor, voters: Tensor, steps: int = 1) -> Judgement:
        """Judge one ballot, and remember it; in float64 on the host.

        Args:
            momenta: `(V, V)`, Gramian of the momenta, with the ballot's gradients in them.
            gradients: `(V, V)`, Gramian of the ballot's gradients; zeros beside who has none.
            voters: bool `(V,)`, who has a gradient that is finite and not zero.
            steps: how many steps the ballot is about.
        """
        if self.cosines.shape[1:] != momenta.shape:
            self.cosines = torch.zeros(2, *momenta.shape, dtype=torch.float64)
            self.equal = torch.zeros_like(momenta)
        equal = self._find_equal(gradients, voters, steps)
        itself = torch.arange(len(voters))
        first = (equal | torch.eye(len(voters), dtype=torch.bool)).long().argmax(1)  # of those that are equal
        z, members = distances(momenta, voters & (first == itself))
        z = torch.where(voters, z[first], math.nan)
        flipped = self._find_flipped(gradients, voters, steps)
        return Judgement(z, flipped, equal, _moves(z, members, voters, momenta.diagonal().isfinite()))

    def _find_equal(self, gradients: Tensor, voters: Tensor, steps: int) -> Tensor:
        square = torch.where(voters, gradients.diagonal(), 0)
        apart = square[:, None] + square[None, :] - 2 * gradients
        same = voters[:, None] & voters[None, :] & (apart <= _SAME * square)
        self.equal = torch.where(same, self.equal + steps, 0)
        return (self.equal >= _ALIKE) & ~torch.eye(len(voters), dtype=torch.bool)

    def _find_flipped(self, gradients: Tensor, voters: Tensor, steps: int) -> Tensor:
        pairs = voters[:, None] & voters[None, :]
        decay = _DECAY**steps
        each = (1 - decay) / (1 - _DECAY)  # so many steps at once count as many times
        now = each * torch.stack([torch.where(pairs, cosine(gradients), 0), pairs.double()])
        self.cosines = torch.where(pairs, decay * self.cosines, self.cosines) + now
        total, number = self.cosines
        return find_flipped(torch.where(number > _ENOUGH, total / number, 0), voters)


def find_flipped(similarity: Tensor, voters: Tensor) -> Tensor:
    """Return whose mirror image would be a member by mean cosines `(V, V)`, bool `(V,)`.

    With a_j the (h−1)-th largest mean cosine of j with others, and q the lower median of a over the voters: where
    q > 0 and −2q ≤ a_j ≤ −q/2. The range must not be wider: honest ranks with data of their own reach −7 q.
    """
    itself = torch.eye(len(voters), dtype=torch.bool)
    order = torch.where(voters, similarity, -math.inf).masked_fill(itself, math.inf).sort(1, descending=True)
    a = order.values.index_select(1, (voters.sum() // 2).view(1)).squeeze(1)
    q = lower_median(a, voters)
    return voters & (q > 0) & (-2 * q <= a) & (a <= -q / 2)


def _moves(z: Tensor, members: Tensor, voters: Tensor, known: Tensor) -> Tensor:
    """Return what brings far momenta nearer and takes the members' mean off all that have a gradient now."""
    itself = torch.eye(len(voters), dtype=torch.float64)
    mean = members.double() / members.sum().clamp(min=1)
    others = members.double() * (1 - itself)  # row j: the members without j
    mean_of_others = others / others.sum(1, keepdim=True).clamp(min=1)
    stays = torch.where(known, torch.where(z > _REACH, _REACH / z, 1), 0)[:, None]
    return stays * itself + (1 - stays) * mean_of_others - (voters | ~known)[:, None] * mean
