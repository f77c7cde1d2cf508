"""Which gradients agree: policies from a Gram matrix `(W, W)` to weights `(W,)`.

Every cosine GAF needs, also that with a running sum, follows from the Gramian: with `v = Σ_j w_j g_j`,
`cos(g_i, v) = (G w)_i / sqrt(G_ii · wᵀ G w)`. So a policy needs no gradient, no process and no host sync.
Distances are cosine distances, `1 − cos`, in [0, 2].
"""

import math
from typing import Literal

import torch
from torch import Tensor


class Weighting:
    """A pure, deterministic function from a Gramian to weights that knows what an absent rank is.

    A rank whose row and column are zero (or whose diagonal entry is not finite) is absent: it gets weight 0,
    takes no part in any vote and is in no divisor. Callables that are not of this class (TorchJD's weightings,
    a lambda) are shown the Gramian of the present ranks alone.

    A class may say its rule a second way, in plain numbers, as a hundred small tensor operations cost more where
    ranks are few and on the CPU: `of_few(gramian, voters)` takes the Gramian as lists and the ranks that vote, and
    returns what each kept rank counts in the average. A subclass of such a class is asked by its own ways alone.
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)` of a Gramian `(W, W)`, in its dtype, on its device."""
        raise NotImplementedError


class Mean(Weighting):
    """Plain averaging: `1 / (number of voters)` for each voter. What DDP does, as a weighting."""

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`."""
        return _average(present(gramian), gramian.dtype)

    def of_few(self, gramian: list[list[float]], voters: list[int]) -> dict[int, float]:
        """Return what each kept rank counts."""
        return dict.fromkeys(voters, 1.0)

    def __repr__(self) -> str:
        """Return the constructor call."""
        return "Mean()"


class NeighborhoodAgreement(Weighting):
    """Keep the voter with the most voters within tau of it, and those voters.

    Ties go to the smallest sum of distances to them, then to the lowest rank. Up to that last tie the rule does
    not depend on the order of the ranks, so a bad rank 0 does no more harm than another.

    Args:
        tau: largest cosine distance at which two gradients agree, in [0, 2]; 2 keeps every voter.

    Fewer than two kept out of two or more voters is no agreement (all weights 0); a single voter passes.
    """

    def __init__(self, tau: float) -> None:
        self.tau = require_tau(tau)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`."""
        voters = present(gramian)
        distance = 1 - cosine(gramian)
        both = voters[:, None] & voters[None, :]
        near = (both & (distance <= self.tau)) | torch.diag(voters)
        count = near.sum(1)
        spread = torch.where(near, distance, 0).sum(1)
        spread = torch.where(count == count.max(), spread, math.inf)
        ranks = torch.arange(len(gramian), device=gramian.device)
        centre = torch.where(spread == spread.min(), ranks, len(gramian)).min()
        kept = near.index_select(0, centre.view(1)).squeeze(0)
        return _average(_agreeing(kept, voters), gramian.dtype)

    def of_few(self, gramian: list[list[float]], voters: list[int]) -> dict[int, float]:
        """Return what each kept rank counts."""
        distance = {i: {j: 1 - plain_cosine(gramian, i, j) for j in voters} for i in voters}
        near = {i: [j for j in voters if j == i or distance[i][j] <= self.tau] for i in voters}
        spread = {i: math.fsum(distance[i][j] for j in near[i]) for i in voters}
        centre = min(voters, key=lambda i: (-len(near[i]), spread[i], i), default=None)
        return {} if centre is None or len(near[centre]) < 2 <= len(voters) else dict.fromkeys(near[centre], 1.0)

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"NeighborhoodAgreement(tau={self.tau})"


class SequentialAgreement(Weighting):
    """The paper's rule (arXiv 2412.18052, algorithm 1): visit the gradients in order, keep what agrees.

    Starts from the first voter and keeps each later one whose distance to the running combination of the kept
    is at most tau. The first voter is never questioned: if it is bad, the good ones are left out.

    Args:
        tau: largest cosine distance to the running combination, in [0, 2].
        running: `"mean"`, the paper's average of the kept; `"half"`, the authors' released code, which keeps
            `(v + g_i) / 2`, so that later gradients weigh more.

    Fewer than two kept out of two or more voters is no agreement (all weights 0); a single voter passes.
    """

    def __init__(self, tau: float, running: Literal["mean", "half"] = "mean") -> None:
        self.tau = require_tau(tau)
        if running not in ("mean", "half"):
            raise ValueError(f"running must be 'mean' or 'half', found {running!r}")
        self.running = running

    @property
    def factor(self) -> float:
        """What the running combination is multiplied by with each gradient that joins it."""
        return 0.5 if self.running == "half" else 1.0

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`."""
        voters = present(gramian)
        inner = torch.where(voters[:, None] & voters[None, :], gramian, 0).double()
        one_hot = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        weights = torch.zeros_like(inner[0])  # v = Σ weights_j g_j
        against = torch.zeros_like(inner[0])  # inner products of v with every gradient
        square = torch.zeros_like(inner[0, 0])  # |v|²
        for i, row in enumerate(inner):
            first = weights.count_nonzero() == 0
            length = (row[i] * square).sqrt()
            distance = 1 - torch.where(length > 0, against[i] / length, 0).clamp(-1, 1)
            keep = voters[i] & (first | (distance <= self.tau))
            factor = torch.where(first, 1.0, self.factor)
            square = torch.where(keep, factor**2 * (square + 2 * against[i] + row[i]), square)
            against = torch.where(keep, factor * (against + row), against)
            weights = torch.where(keep, factor * (weights + one_hot[i]), weights)
        total = weights.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return (weights / total * _agreeing(weights != 0, voters)).to(gramian.dtype)

    def of_few(self, gramian: list[list[float]], voters: list[int]) -> dict[int, float]:
        """Return what each kept rank counts."""
        counts: dict[int, float] = {}
        square, against = 0.0, dict.fromkeys(voters, 0.0)  # |v|², and inner products of v with every gradient
        for i in voters:
            own = gramian[i][i]
            if counts and not 1 - _ratio(against[i], own * square) <= self.tau:  # NaN is not near
                continue
            factor = self.factor if counts else 1.0
            square = factor * factor * (square + 2 * against[i] + own)
            against = {j: factor * (against[j] + gramian[i][j]) for j in voters}
            counts = {j: factor * count for j, count in counts.items()} | {i: factor}
        return {} if len(counts) < 2 <= len(voters) else counts

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"SequentialAgreement(tau={self.tau}, running={self.running!r})"


def cosine(gramian: Tensor) -> Tensor:
    """Return the cosines `(W, W)` between the gradients, float64, in [-1, 1]; 0 beside an absent rank.

    In float64 a gradient and its copy are at distance exactly 0: `sqrt(x · x)` is x.
    """
    voters = present(gramian)
    inner = torch.where(voters[:, None] & voters[None, :], gramian, 0).double()
    square = inner.diagonal()
    length = (square[:, None] * square[None, :]).sqrt()
    return torch.where(length > 0, inner / length, 0).clamp(-1, 1)


def present(gramian: Tensor) -> Tensor:
    """Return which gradients are finite and not zero, bool `(W,)`."""
    square = gramian.diagonal()
    return square.isfinite() & (square > 0)


def plain_cosine(gramian: list[list[float]], i: int, j: int) -> float:
    """Return one of the `cosine`s in plain numbers, of two gradients that are present."""
    return _ratio(gramian[i][j], gramian[i][i] * gramian[j][j])


def require_tau(tau: float) -> float:
    """Return tau as a float, or raise ValueError unless it is a number in [0, 2]."""
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 2:
        raise ValueError(f"tau must be a cosine distance in [0, 2], found {tau!r}")
    return float(tau)


def _agreeing(kept: Tensor, voters: Tensor) -> Tensor:
    """Return kept, or nothing kept where two or more voters left fewer than two."""
    return kept & ((kept.sum() >= 2) | (voters.sum() < 2))


def _average(kept: Tensor, dtype: torch.dtype) -> Tensor:
    return kept.to(dtype) / kept.sum().clamp(min=1)


def _ratio(product: float, squares: float) -> float:
    """Return product / sqrt(squares) within [-1, 1]; 0 where there is no length, NaN where product is."""
    if not squares > 0:
        return 0.0
    cosine = product / math.sqrt(squares)
    return 1.0 if cosine > 1 else -1.0 if cosine < -1 else cosine
