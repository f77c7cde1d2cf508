"""Medians of chosen values, without a host sync."""

import math

import torch
from torch import Tensor


def lower_median(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the lower median `()` of the chosen values `(W,)`; inf where there are none."""
    ordered = torch.where(chosen, values, math.inf).sort().values
    return ordered.index_select(0, ((chosen.sum() - 1).clamp(min=0) // 2).view(1)).squeeze(0)


def upper_median(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the upper median of the chosen values along the ranks, which half of them never exceed.

    Args:
        values: `(W,)` or `(W, B)`.
        chosen: bool, of the same shape.

    Returns:
        `()` or `(B,)`; inf where none is chosen.
    """
    ordered = torch.where(chosen, values, math.inf).sort(0).values
    number = chosen.sum(0, keepdim=True)
    return ordered.gather(0, torch.minimum(number // 2, (number - 1).clamp(min=0))).squeeze(0)
