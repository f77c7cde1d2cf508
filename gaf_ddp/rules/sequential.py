"""The paper's rule: gradients in order, each kept if it agrees with the combination of those kept before it."""

from typing import Literal

import torch
from torch import Tensor

from gaf_ddp.rules.weighting import Weighting, agreeing, present, require_tau


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
        return (weights / total * agreeing(weights != 0, voters)).to(gramian.dtype)

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"SequentialAgreement(tau={self.tau}, running={self.running!r})"
