"""The default decision in plain numbers: for few ranks on the CPU, a hundred small tensor operations cost more."""

import math
from statistics import median_low

import torch
from torch import Tensor

MOST = 16  # ranks; the time grows with their square


def can_decide(gramian: Tensor) -> bool:
    """Return whether this is the faster way."""
    return gramian.device.type == "cpu" and len(gramian) <= MOST


def neighborhood(gramian: Tensor, tau: float, max_norm_ratio: float | None) -> tuple[Tensor, ...]:
    """Judge a Gramian `(W, W)` by NeighborhoodAgreement(tau) behind the voter's guards.

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
            length = math.sqrt(square[i] * square[j])
            cosine[i][j] = _clamp(inner[i][j] / length) if length > 0 else 0.0
    kept = _largest_neighborhood(cosine, voters, tau)
    poisoned = any(nonfinite) and not voters
    share = math.nan if poisoned else 1 / max(len(kept), 1)
    each = torch.tensor([[i in kept, i in voters, nonfinite[i], i in norm and i not in voters] for i in ranks])
    is_kept, is_voter, is_nonfinite, is_overlong = each.view(-1, 4).T.contiguous()
    return (
        torch.tensor(cosine, dtype=torch.float64).view(len(inner), len(inner)),
        torch.tensor([share if poisoned or i in kept else 0.0 for i in ranks], dtype=gramian.dtype),
        is_kept,
        torch.tensor(bool(kept) or not (voters or poisoned)),
        is_voter,
        is_nonfinite,
        is_overlong,
    )


def _largest_neighborhood(cosine: list[list[float]], voters: list[int], tau: float) -> list[int]:
    """Return the centre's neighbours, itself included; none where two or more voters left fewer than two."""
    if not voters:
        return []
    near = {i: [j for j in voters if j == i or 1 - cosine[i][j] <= tau] for i in voters}
    spread = {i: math.fsum(1 - cosine[i][j] for j in near[i]) for i in voters}
    centre = min(voters, key=lambda i: (-len(near[i]), spread[i], i))
    return near[centre] if len(near[centre]) > 1 or len(voters) == 1 else []


def _clamp(cosine: float) -> float:
    """Return cosine within [-1, 1]; NaN stays."""
    return 1.0 if cosine > 1 else -1.0 if cosine < -1 else cosine
