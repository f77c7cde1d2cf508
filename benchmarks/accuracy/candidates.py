"""Rules tried against the random controls under uniform label noise; none is in the package (see the results)."""

from collections import deque

import torch
from torch import Tensor

from gaf_ddp import NeighborhoodAgreement, Weighting
from gaf_ddp.weighting import cosine, present

RECENT = 50  # steps whose distances a quantile is taken over


class QuantileAgreement(Weighting):
    """NeighborhoodAgreement whose tau is a quantile of the pairwise distances of the recent steps.

    Deterministic in the sequence of Gramians, so alike on all ranks.
    """

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._recent: deque[Tensor] = deque(maxlen=RECENT)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`, by the distances up to and including this step's."""
        voters = present(gramian)
        pairs = torch.triu(voters[:, None] & voters[None, :], diagonal=1)
        self._recent.append((1 - cosine(gramian))[pairs])
        distances = torch.cat(list(self._recent))
        tau = float(distances.quantile(self._quantile)) if len(distances) else 1.0
        return NeighborhoodAgreement(min(max(tau, 0.0), 2.0))(gramian)


class MemoryAgreement(Weighting):
    """Keep the ranks within tau of the running mean of past updates, which comes as the Gramian's last row.

    It needs an engine that adds that row (`remembers`); the package's hook does not, so this runs in one process
    only. Where there is no memory yet, everyone is kept; one kept rank is enough for a step.
    """

    remembers = True

    def __init__(self, tau: float) -> None:
        self._tau = tau

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W + 1,)`, the last of them 0."""
        voters = present(gramian)
        near = (1 - cosine(gramian)[-1]) <= self._tau
        kept = voters & (near | ~voters[-1])
        kept[-1] = False
        return kept.to(gramian) / kept.sum().clamp(min=1)


class SoftAgreement(Weighting):
    """Weights by how well a rank agrees with the others' mean: `max(0, cosine)` to a power, summing to 1."""

    def __init__(self, power: float) -> None:
        self._power = power

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`; all 0 where no rank agrees with the others."""
        inner = gramian.double()
        others = (~torch.eye(len(inner), dtype=torch.bool, device=inner.device) & present(gramian)).double()
        toward = (inner * others).sum(1)
        length = torch.einsum("ij,jk,ik->i", others, inner, others).clamp(min=0).sqrt() * inner.diagonal().sqrt()
        agreement = torch.where(length > 0, toward / length, 0).clamp(0, 1) ** self._power
        weights = torch.where(present(gramian), agreement, 0)
        return (weights / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)).to(gramian)
