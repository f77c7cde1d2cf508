"""Decisions in plain numbers: for few ranks on the CPU, a hundred small tensor operations cost more."""

import math
from collections.abc import Callable
from statistics import median_low

import torch
from torch import Tensor

from gaf_ddp.weighting import NeighborhoodAgreement, TauRule, is_tau_rule

MOST = 16  # ranks; the time grows with their square


def can_decide(gramian: Tensor, weighting: Callable[[Tensor], Tensor]) -> bool:
    """Return whether this is the faster way."""
    return is_tau_rule(weighting) and gramian.device.type == "cpu" and len(gramian) <= MOST


def decide(gramian: Tensor, weighting: TauRule, max_norm_ratio: float | None) -> tuple[Tensor, ...]:
    """Judge a Gramian `(W, W)` by the weighting behind the voter's guards.

    Returns the fields of `Agreement` after the Gramian, in their order.
    """
    inner = gramian.tolist()
    ranks = range(len(inner))
    square = [inner[i][i] for i in ranks]
    nonfinite = [not math.isfinite(s) for s in square]
    norm = {i: math.sqrt(square[i]) for i in ranks if square[i] > 0 and not nonfinite[i]}
    limit = math.inf if max_norm_ratio is None or not norm else max_norm_ratio * median_low(norm.values())
    voters = [i for i in norm if norm[i] <= limit]
    cosine = [[0.0 for _ in ranks] for _ in ranks]
    for i in voters:
        for j in voters:
            cosine[i][j] = _cosine(inner[i][j], square[i] * square[j])
    counts = _counts(weighting, inner, cosine, voters)
    poisoned = any(nonfinite) and not voters
    total = sum(counts.values())
    shares = [math.nan if poisoned else counts[i] / total if i in counts else 0.0 for i in ranks]
    is_kept, is_voter, is_nonfinite, is_overlong = torch.tensor(
        [
            [i in counts for i in ranks],
            [i in voters for i in ranks],
            nonfinite,
            [i in norm and i not in voters for i in ranks],
        ]
    ).unbind()
    return (
        torch.tensor(cosine, dtype=torch.float64),
        torch.tensor(shares, dtype=gramian.dtype),
        is_kept,
        torch.tensor(bool(counts) or not (voters or poisoned)),
        is_voter,
        is_nonfinite,
        is_overlong,
    )


def _counts(
    weighting: TauRule, inner: list[list[float]], cosine: list[list[float]], voters: list[int]
) -> dict[int, float]:
    """Return what each kept rank counts; nothing where two or more voters left fewer than two."""
    if isinstance(weighting, NeighborhoodAgreement):
        counts = _largest_neighborhood(cosine, voters, weighting.tau)
    else:
        counts = _sequence(inner, voters, weighting.tau, weighting.factor)
    return {} if len(counts) < 2 <= len(voters) else counts


def _largest_neighborhood(cosine: list[list[float]], voters: list[int], tau: float) -> dict[int, float]:
    """Return what the centre's neighbours, itself included, count."""
    if not voters:
        return {}
    near = {i: [j for j in voters if j == i or 1 - cosine[i][j] <= tau] for i in voters}
    spread = {i: math.fsum(1 - cosine[i][j] for j in near[i]) for i in voters}
    centre = min(voters, key=lambda i: (-len(near[i]), spread[i], i))
    return dict.fromkeys(near[centre], 1.0)


def _sequence(inner: list[list[float]], voters: list[int], tau: float, factor: float) -> dict[int, float]:
    """Return what the kept count in their running combination, which factor shrinks with each after the first."""
    counts: dict[int, float] = {}
    square, against = 0.0, dict.fromkeys(voters, 0.0)  # of the combination, and its products with every gradient
    for i in voters:
        if counts and not 1 - _cosine(against[i], inner[i][i] * square) <= tau:  # NaN is not near
            continue
        scale = factor if counts else 1.0
        square = scale * scale * (square + 2 * against[i] + inner[i][i])
        against = {j: scale * (against[j] + inner[i][j]) for j in voters}
        counts = {j: scale * count for j, count in counts.items()} | {i: scale}
    return counts


def _cosine(product: float, squares: float) -> float:
    """Return product / sqrt(squares) within [-1, 1]; 0 where there is no length, NaN where product is."""
    if not squares > 0:
        return 0.0
    cosine = product / math.sqrt(squares)
    return 1.0 if cosine > 1 else -1.0 if cosine < -1 else cosine
