"""What a rule is: a function from a Gram matrix `(W, W)` to weights `(W,)`; and what rules share.

Every cosine GAF needs, also that with a running sum, follows from the Gramian: with `v = Σ_j w_j g_j`,
`cos(g_i, v) = (G w)_i / sqrt(G_ii · wᵀ G w)`. So a rule needs no gradient, no process and no host sync.
Distances are cosine distances, `1 − cos`, in [0, 2].
"""

import torch
from torch import Tensor


class Weighting:
    """A pure, deterministic function from a Gramian to weights that knows what an absent rank is.

    A rank whose row and column are zero (or whose diagonal entry is not finite) is absent: it gets weight 0,
    takes no part in any vote and is in no divisor. Callables that are not of this class (TorchJD's weightings,
    a lambda) are shown the Gramian of the present ranks alone.

    Where two ranks or more are present, a rule that keeps by agreement keeps two or none, since one agrees with nobody
    (`agreeing`). Give a rule a `repr` with its parameters: ranks compare it.
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)` of a Gramian `(W, W)`, in its dtype, on its device."""
        raise NotImplementedError


class Mean(Weighting):
    """Plain averaging: `1 / (number of voters)` for each voter. What DDP does, as a weighting."""

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`."""
        return average(present(gramian), gramian.dtype)

    def __repr__(self) -> str:
        """Return the constructor call."""
        return "Mean()"


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


def require_tau(tau: float) -> float:
    """Return tau as a float, or raise ValueError unless it is a number in [0, 2]."""
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 2:
        raise ValueError(f"tau must be a cosine distance in [0, 2], found {tau!r}")
    return float(tau)


def agreeing(kept: Tensor, voters: Tensor) -> Tensor:
    """Return kept, or nothing kept where two or more voters left fewer than two."""
    return kept & ((kept.sum() >= 2) | (voters.sum() < 2))


def average(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return equal weights `(W,)` for the kept, 0 for the others."""
    return kept.to(dtype) / kept.sum().clamp(min=1)
