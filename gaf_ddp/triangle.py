"""All-reducing Gramians: symmetric, so that beyond a few ranks only one triangle of them travels."""

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

MOST_WHOLE = 64  # ranks; up to these W² floats are no bytes to speak of, and launches cost more


def numbers(size: int) -> int:
    """Return how many numbers of a Gramian of so many ranks are all-reduced."""
    return size**2 if size <= MOST_WHOLE else size * (size + 1) // 2


def all_reduce(gramian: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add up every rank's Gramian.

    Args:
        gramian: `(W, W)` symmetric, or with further rows below, which travel whole.
        group: the W ranks.

    Returns:
        The sum, in gramian's shape. Beyond `MOST_WHOLE` ranks `W (W + 1)/2` numbers travel in place of W².
    """
    size = gramian.shape[1]
    if size <= MOST_WHOLE:
        dist.all_reduce(gramian, group=group)
        return gramian
    i, j = _lower_triangle(size, gramian.device)
    packed = torch.cat([gramian[i, j], gramian[size:].flatten()])
    dist.all_reduce(packed, group=group)
    triangle, below = packed[: len(i)], packed[len(i) :]
    total = torch.empty_like(gramian)
    total[i, j] = triangle
    total[j, i] = triangle
    total[size:] = below.view(-1, size)
    return total


@cache
def _lower_triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each entry of the lower triangle, the diagonal with it."""
    i, j = torch.tril_indices(size, size, device=device)
    return i, j
