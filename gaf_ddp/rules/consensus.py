"""The rule without a threshold: leave out ranks that are far from the consensus, in units of its own median distance.

Cosines are the wrong quantity for long memories: where training goes well, averaging cancels what ranks have in
common, and the cosines of honest ranks fall to 0. Distances to the consensus stay telling: z is about 1 if all ranks
are alike, or all differ equally, and 3 to 30 for bad ones. With n voters and h = ⌊n/2⌋ + 1,

    centre   the voter whose (h−1)-th nearest other is nearest; among equals, the smallest sum of those h−1 distances
    members  the centre and all voters no farther from it than its (h−1)-th nearest other
    far_j²   = |m_j − mean(members without j)|² / (1 + 1/how many those are): so members and others expect the same
    z_j      = far_j / lower median of far over the members
    keep j   ⇔  z_j ≤ ratio

All of it follows from the Gramian, by squared distances D: |m_j − mean|² = mean_a D_ja − mean_ab D_ab / 2.
"""

import math

import torch
from torch import Tensor

from gaf_ddp.rules.medians import lower_median
from gaf_ddp.rules.weighting import Weighting, present

# Least unit, in lengths of a member. A float32 Gramian resolves no distance below 5e-4: that of copies is noise.
_LEAST = 1e-3
_TINY = torch.finfo(torch.float64).tiny  # where all vectors are zero


class ConsensusAgreement(Weighting):
    """Keep the voters whose distance to the consensus is at most ratio times its members' median distance.

    Does not depend on the order of the ranks, nor on the gradients' unit. One or two voters are kept, and of more
    some always are, so that no step is ever skipped. `GAFState()` judges by this rule, with a memory of the last
    hundred steps: it takes the ratio from here, and `ballots/judge.py` decides, by `distances` below and
    `rules/memory.py`. As a function of one Gramian the rule has no memory.

    Args:
        ratio: largest z of a kept rank, above 1. 2 to 4 do the same, 1.5 leaves out honest ranks.
    """

    def __init__(self, ratio: float = 3.0) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio > 1:
            raise ValueError(f"ratio must be a number > 1, found {ratio!r}")
        self.ratio = float(ratio)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`."""
        voters = present(gramian)
        kept = voters & (distances(gramian, voters)[0] <= self.ratio)
        kept = kept | (voters & ~kept.any())
        return (kept.double() / kept.sum().clamp(min=1)).to(gramian.dtype)

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"ConsensusAgreement(ratio={self.ratio})"


def distances(gramian: Tensor, voters: Tensor) -> tuple[Tensor, Tensor]:
    """Find the members of the consensus and everybody's distance to them; never waits for an accelerator.

    Args:
        gramian: `(W, W)`; a vector that is not finite has a diagonal entry that is not.
        voters: bool `(W,)`, who may be a member; those whose vectors are not finite may not.

    Returns:
        z `(W,)` float64, NaN for vectors that are not finite, and where only one votes, for all others; and the
        members, bool `(W,)`.
    """
    known = gramian.diagonal().isfinite()
    voters = voters & known
    inner = torch.where(known[:, None] & known[None, :], gramian, 0).double()
    square = inner.diagonal()
    distance = (square[:, None] + square[None, :] - (inner + inner.mT)).clamp(min=0)
    count = voters.sum()
    members = _members(distance, voters)
    others = members.sum() - members.double()  # how many each is held against
    near = torch.where(members, distance, 0).sum(1)
    own = torch.where(members, near, 0)
    number = others.clamp(min=1)
    far = ((near / number - (own.sum() - 2 * own) / (2 * number**2)) / (1 + 1 / number)).clamp(min=0)
    length = torch.where(members, square, 0).sum() / members.sum().clamp(min=1)
    unit = torch.maximum(lower_median(far, members), _LEAST**2 * length).clamp(min=_TINY)
    return torch.where(voters | (known & (count > 1)), (far / unit).sqrt(), math.nan), members


def _members(distance: Tensor, voters: Tensor) -> Tensor:
    """Return the consensus's members, bool `(W,)`, by squared distances `(W, W)`."""
    ranks = torch.arange(len(distance), device=distance.device)
    half = (voters.sum() // 2).view(1)
    nearest = torch.where(voters, distance, math.inf).sort(1).values  # a voter's first is itself
    radius = torch.where(voters, nearest.index_select(1, half).squeeze(1), math.inf)
    spread = torch.where(ranks <= half, nearest, 0).sum(1)
    spread = torch.where(voters & (radius == radius.min()), spread, math.inf)
    centre = torch.where(spread == spread.min(), ranks, len(ranks)).min().view(1)
    return voters & (distance.index_select(0, centre) <= radius.index_select(0, centre)).squeeze(0)
