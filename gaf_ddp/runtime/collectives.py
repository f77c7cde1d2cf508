"""Collectives beside torch's: under the names torch has today, for symmetric matrices, and for text."""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 deprecates the long names for the short ones, which 2.12 does not have.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_MOST_WHOLE = 64  # ranks; up to these W² numbers are no bytes to speak of, and launches cost more


def reduced_numbers(size: int) -> int:
    """Return how many numbers of a Gramian of so many ranks are all-reduced."""
    return size**2 if size <= _MOST_WHOLE else size * (size + 1) // 2


def all_reduce_gramian(gramian: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add up every rank's Gramian.

    Args:
        gramian: `(W, W)` symmetric, or with further rows below, which travel whole.
        group: the W ranks.

    Returns:
        The sum, in gramian's shape. Beyond 64 ranks `W (W + 1)/2` numbers travel in place of W².
    """
    size = gramian.shape[1]
    if size <= _MOST_WHOLE:
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


def all_gather_text(text: str, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Return every rank's text, in rank order, at host syncs; its bytes travel as a tensor on the device.

    `dist.all_gather_object` would need numpy, pickles, and uses the current device.
    """
    content = bytearray(text.encode())
    longest = torch.tensor([len(content)], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    padded = torch.frombuffer(content.ljust(int(longest), b"\0"), dtype=torch.uint8).to(device)
    everyone = padded.new_empty(group.size() * len(padded))
    all_gather_single(everyone, padded, group=group)
    return [bytes(each.tolist()).rstrip(b"\0").decode() for each in everyone.view(group.size(), -1)]


@cache
def _lower_triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each entry of the lower triangle, the diagonal with it."""
    i, j = torch.tril_indices(size, size, device=device)
    return i, j
