"""Gradients to judge: W vectors that agree more or less, and ways to spoil some of them."""

import torch
from torch import Tensor


def random_gradients(world_size: int, count: int, seed: int = 0) -> Tensor:
    """Return `(W, n)` float32: a common direction at a random, sometimes negative strength, plus noise.

    Cosine distances spread over about 0.3 to 1.6 and norms over a factor of about 3, so that every tau between
    keeps some and leaves some out.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(count, generator=generator)
    strength = torch.linspace(-0.7, 1.6, world_size)[torch.randperm(world_size, generator=generator)]
    noise = torch.randn(world_size, count, generator=generator)
    norms = 0.5 + torch.rand(world_size, 1, generator=generator)
    return norms * (strength[:, None] * direction + noise)


def agreeing_gradients(world_size: int, count: int, seed: int = 0) -> Tensor:
    """Return `(W, n)` float32 whose pairwise cosine distances are near 0.2."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(count, generator=generator)
    return direction + 0.5 * torch.randn(world_size, count, generator=generator)
