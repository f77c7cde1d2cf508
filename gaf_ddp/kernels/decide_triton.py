"""Decisions in Triton, for accelerators: one launch and no host sync.

`decide` equals the one in agreement.py, which stays the reference, in float64 as that.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gaf_ddp.kernels.gram_triton import OPTIONS
from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.rules.neighborhood import NeighborhoodAgreement
from gaf_ddp.rules.sequential import SequentialAgreement
from gaf_ddp.rules.weighting import Mean

_LARGEST = 1024  # ranks


def can_decide(gramian: Tensor, weighting: Callable[[Tensor], Tensor]) -> bool:
    """Return whether `decide` takes this Gramian and this weighting; a subclass may have another rule."""
    known = type(weighting) in (Mean, NeighborhoodAgreement, SequentialAgreement)
    return known and gramian.dtype == torch.float64 and 2 <= len(gramian) <= _LARGEST


def decide(
    gramian: Tensor, weighting: Mean | NeighborhoodAgreement | SequentialAgreement, max_norm_ratio: float | None
) -> Agreement:
    """Judge a Gramian `(W, W)` by the weighting behind the voter's guards."""
    count, device = len(gramian), gramian.device
    padded = triton.next_power_of_2(count)
    cosine = torch.empty(count, count, dtype=torch.float64, device=device)
    weights = torch.empty(count, dtype=torch.float64, device=device)
    kept, voters, nonfinite, overlong = torch.empty(4, count, dtype=torch.bool, device=device)
    agreed = torch.empty((), dtype=torch.bool, device=device)
    with torch.cuda.device_of(gramian):  # Triton launches on the current device
        _decision_kernel[(1,)](
            gramian.contiguous(), cosine, weights, kept, agreed, voters, nonfinite, overlong,
            # At a distance of 2 every voter is near: a mean.
            tau=getattr(weighting, "tau", 2.0), ratio=float("inf") if max_norm_ratio is None else max_norm_ratio,
            COUNT=count, PADDED=padded, TILE=min(padded, max(1, 4096 // padded)),
            SEQUENTIAL=isinstance(weighting, SequentialAgreement), FACTOR=getattr(weighting, "factor", 1.0),
            num_warps=4 if padded <= 64 else 8, **OPTIONS,
        )  # fmt: skip
    return Agreement(gramian, cosine, weights, kept, agreed, voters, nonfinite, overlong)


@triton.jit
def _decision_kernel(
    gramian, cosine, weights, keeps, agreed, votes, nonfinites, overlongs,
    tau: tl.float64, ratio: tl.float64,  # else rounded to float32, as the interpreter does
    COUNT: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, SEQUENTIAL: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Find the voters and what each counts; write the record."""
    tau, ratio = tl.full((), tau, tl.float64), tl.full((), ratio, tl.float64)
    j = tl.arange(0, PADDED)
    exists = j < COUNT
    square = tl.load(gramian + j * COUNT + j, mask=exists, other=0.0)
    finite = (square - square) == 0.0  # NaN and inf are not
    candidate = exists & finite & (square > 0.0)
    norm = tl.sqrt(tl.where(candidate, square, 0.0))
    ordered = tl.sort(tl.where(candidate, norm, float("inf")))
    number = tl.sum(candidate.to(tl.int32), axis=0)
    middle = tl.maximum(tl.minimum(number // 2, number - 1), 0)
    median = tl.sum(tl.where(j == middle, ordered, 0.0), axis=0)  # the upper one
    overlong = candidate & (norm > ratio * median)
    voter = candidate & ~overlong
    voters = tl.sum(voter.to(tl.int32), axis=0)

    counts = _neighbours(gramian, cosine, j, square, voter, tau, COUNT, TILE, PADDED)  # writes the cosines too
    if SEQUENTIAL:
        counts = _sequence(gramian, j, square, voter, tau, FACTOR, COUNT, PADDED)
    number = tl.sum((counts > 0.0).to(tl.int32), axis=0)
    agreeing = (number >= 2) | (voters < 2)
    total = tl.sum(counts, axis=0)
    share = tl.where(agreeing, counts / tl.where(total > 0.0, total, 1.0), 0.0)
    kept = share != 0.0
    nonfinite = exists & ~finite
    poisoned = (tl.sum(nonfinite.to(tl.int32), axis=0) > 0) & (voters == 0)
    something = tl.sum(kept.to(tl.int32), axis=0) > 0

    tl.store(weights + j, tl.where(poisoned, float("nan"), share), mask=exists)
    tl.store(keeps + j, kept, mask=exists)
    tl.store(votes + j, voter, mask=exists)
    tl.store(nonfinites + j, nonfinite, mask=exists)
    tl.store(overlongs + j, overlong, mask=exists)
    tl.store(agreed, something | ((voters == 0) & ~poisoned))


@triton.jit
def _neighbours(
    gramian, cosine, j, square, voter, tau, COUNT: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Return what each rank counts, float64: 1 if near the rank with the most, then the closest, neighbours.

    Go through the rows tile by tile, and write the cosines.
    """
    best_count = -1
    best_spread = tl.sum(tl.zeros((PADDED,), dtype=tl.float64), axis=0)
    counts = tl.zeros((PADDED,), dtype=tl.float64)
    for first in range(0, COUNT, TILE):
        i = first + tl.arange(0, TILE)
        inside = (i < COUNT)[:, None] & (j < COUNT)[None, :]
        product = tl.load(gramian + i[:, None] * COUNT + j[None, :], mask=inside, other=0.0)
        mine = i[:, None] == j[None, :]
        square_i = tl.sum(tl.where(mine, square[None, :], 0.0), axis=1)
        voter_i = tl.sum((mine & voter[None, :]).to(tl.int32), axis=1) > 0
        both = voter_i[:, None] & voter[None, :]
        similar = _cosine(product, tl.where(both, square_i[:, None] * square[None, :], 0.0))
        tl.store(cosine + i[:, None] * COUNT + j[None, :], similar, mask=inside)
        distance = 1.0 - similar
        near = both & ((distance <= tau) | mine)
        count = tl.sum(near.to(tl.int32), axis=1)
        spread = tl.sum(tl.where(near, distance, 0.0), axis=1)
        most = tl.max(count, axis=0)
        least = tl.min(tl.where(count == most, spread, float("inf")), axis=0)
        lowest = tl.min(tl.where((count == most) & (spread == least), i, PADDED), axis=0)
        better = (most > best_count) | ((most == best_count) & (least < best_spread))
        best_count = tl.where(better, most, best_count)
        best_spread = tl.where(better, least, best_spread)
        counts = tl.where(better, tl.sum((near & (i == lowest)[:, None]).to(tl.float64), axis=0), counts)
    return counts


@triton.jit
def _sequence(
    gramian, j, square, voter, tau, FACTOR: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Return what each rank counts, float64, in the running combination that keeps what agrees with it."""
    counts = tl.zeros((PADDED,), dtype=tl.float64)
    against = tl.zeros((PADDED,), dtype=tl.float64)  # inner products of the combination with every gradient
    total = tl.sum(counts, axis=0)  # its squared norm
    number = 0
    for i in range(COUNT):
        mine = voter & (j == i)
        row = tl.load(gramian + i * COUNT + j, mask=voter, other=0.0)
        own = tl.sum(tl.where(mine, square, 0.0), axis=0)
        product = tl.sum(tl.where(mine, against, 0.0), axis=0)
        near = (1.0 - _cosine(product, own * total)) <= tau
        keep = (tl.sum(mine.to(tl.int32), axis=0) > 0) & ((number == 0) | near)
        factor = tl.where(number == 0, 1.0, FACTOR)
        total = tl.where(keep, factor * factor * (total + 2.0 * product + own), total)
        against = tl.where(keep, factor * (against + row), against)
        counts = tl.where(keep, factor * (counts + tl.where(mine, 1.0, 0.0)), counts)
        number += keep.to(tl.int32)
    return counts


@triton.jit
def _cosine(product, squares):
    """Return product / sqrt(squares) within [-1, 1]; 0 where there is no length."""
    length = tl.sqrt(tl.where(squares > 0.0, squares, 1.0))
    return tl.minimum(tl.maximum(tl.where(squares > 0.0, product / length, 0.0), -1.0), 1.0)
