"""The rule without a threshold: leave out the ranks that are far from the consensus, in its members' own units.

Cosines are the wrong quantity for long memories: where training goes well, averaging cancels what ranks have in
common, and the cosines of honest ranks fall to 0. Distances to the consensus stay: z is about 1 for ranks that are
alike, and for ranks that all differ alike, and 3 to 30 for bad ones. With n voters and h = ⌊n/2⌋ + 1,

    centre   the voter whose (h−1)-th nearest other is nearest; of several, the one whose h−1 nearest are nearer
    members  the centre and all voters no farther from it than its (h−1)-th nearest other
    far_j²   = |m_j − mean(members without j)|² / (1 + 1/how many those are), in and out alike in expectation
    z_j      = far_j / lower median of far over the members
    keep j   ⇔  z_j ≤ ratio

All of it follows from the Gramian, by squared distances D: |m_j − mean|² = mean_a D_ja − mean_ab D_ab / 2. It is
said twice, in tensors that never wait for the device and in plain numbers, as a hundred small tensor operations
cost more where ranks are few and on the CPU.
"""

import math
from statistics import median_low

import torch
from torch import Tensor

from gaf_ddp.weighting import Weighting, present

# Least unit, in lengths of a member: Gramians in float32 see no distance below 5e-4, and copies have nothing else.
_LEAST = 1e-3
_TINY = torch.finfo(torch.float64).tiny  # vectors of zeros have no length either


class ConsensusAgreement(Weighting):
    """Keep the voters whose distance to the consensus is at most ratio times its members' median distance.

    Does not depend on the order of the ranks, nor on the gradients' unit. One or two voters are kept, and of more
    some always are, so that no step is ever skipped.

    Args:
        ratio: largest z of a kept rank, above 1. 2 to 4 do the same, 1.5 leaves out honest ranks.
    """

    def __init__(self, ratio: float = 3.0) -> None:
        self.ratio = require_ratio(ratio)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`."""
        voters = present(gramian)
        return average(judge(gramian, voters)[0] <= self.ratio, voters).to(gramian.dtype)

    def of_few(self, gramian: list[list[float]], voters: list[int]) -> dict[int, float]:
        """Return what each kept rank counts."""
        z, _ = judge_few(gramian, voters)
        return dict.fromkeys([i for i in voters if z[i] <= self.ratio] or voters, 1.0)

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"ConsensusAgreement(ratio={self.ratio})"


def judge(gramian: Tensor, voters: Tensor) -> tuple[Tensor, Tensor]:
    """Find the members and everybody's distance to them.

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
    ranks, count = torch.arange(len(inner), device=inner.device), voters.sum()
    half = (count // 2).view(1)
    nearest = torch.where(voters, distance, math.inf).sort(1).values  # a voter's first is itself
    radius = torch.where(voters, nearest.index_select(1, half).squeeze(1), math.inf)
    spread = torch.where(ranks <= half, nearest, 0).sum(1)
    spread = torch.where(voters & (radius == radius.min()), spread, math.inf)
    centre = torch.where(spread == spread.min(), ranks, len(ranks)).min().view(1)
    members = voters & (distance.index_select(0, centre) <= radius.index_select(0, centre)).squeeze(0)
    others = members.sum() - members.double()  # how many each is held against
    near = torch.where(members, distance, 0).sum(1)
    own = torch.where(members, near, 0)
    number = others.clamp(min=1)
    far = ((near / number - (own.sum() - 2 * own) / (2 * number**2)) / (1 + 1 / number)).clamp(min=0)
    length = torch.where(members, square, 0).sum() / members.sum().clamp(min=1)
    unit = torch.maximum(lower_median(far, members), _LEAST**2 * length).clamp(min=_TINY)
    return torch.where(voters | (known & (count > 1)), (far / unit).sqrt(), math.nan), members


def judge_few(gramian: list[list[float]], voters: list[int]) -> tuple[list[float], list[int]]:
    """Return the same in plain numbers: z of every rank, and the members."""
    square = [row[i] for i, row in enumerate(gramian)]
    known = [i for i, length in enumerate(square) if math.isfinite(length)]
    voters, z = [i for i in voters if i in known], [math.nan] * len(square)
    if not voters:
        return z, []
    distance = {
        i: {j: max(square[i] + square[j] - (gramian[i][j] + gramian[j][i]), 0.0) for j in voters} for i in known
    }
    nearest = {i: sorted(distance[i].values())[: len(voters) // 2 + 1] for i in voters}
    centre = min(voters, key=lambda i: (nearest[i][-1], sum(nearest[i]), i))
    members = [j for j in voters if distance[centre][j] <= nearest[centre][-1]]
    near = {i: sum(distance[i][j] for j in members) for i in known}
    total, far = sum(near[i] for i in members), {}
    for i in known if len(voters) > 1 else voters:
        number = max(len(members) - (i in members), 1)
        within = total - 2 * near[i] * (i in members)
        far[i] = max((near[i] / number - within / (2 * number**2)) / (1 + 1 / number), 0.0)
    length = sum(square[i] for i in members) / len(members)
    unit = max(median_low([far[i] for i in members]), _LEAST**2 * length, _TINY)
    for i, distance_squared in far.items():
        z[i] = math.sqrt(distance_squared / unit)
    return z, members


def average(kept: Tensor, voters: Tensor) -> Tensor:
    """Return the weights `(W,)` float64 of the kept among the voters, or of all voters where that is nobody."""
    kept = kept & voters
    kept = kept | (voters & ~kept.any())
    return kept.double() / kept.sum().clamp(min=1)


def lower_median(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the lower median `()` of the chosen values `(W,)`; inf where there are none."""
    ordered = torch.where(chosen, values, math.inf).sort().values
    return ordered.index_select(0, ((chosen.sum() - 1).clamp(min=0) // 2).view(1)).squeeze(0)


def require_ratio(ratio: float) -> float:
    """Return ratio as a float, or raise ValueError unless it is a number above 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio > 1:
        raise ValueError(f"ratio must be a number > 1, found {ratio!r}")
    return float(ratio)
