"""The rule of tau: the gradients near the one that has most others near it."""

import math

import torch
from torch import Tensor

from gaf_ddp.rules.weighting import Weighting, agreeing, average, cosine, present, require_tau


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
        return average(agreeing(kept, voters), gramian.dtype)

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"NeighborhoodAgreement(tau={self.tau})"
