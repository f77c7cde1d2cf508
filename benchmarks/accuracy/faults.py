"""Broken ranks: what one of them puts in place of its gradient before the others see it.

A fault gets the honest gradients `(H, n)` of the step, the bad rank's own `(n,)`, a memory of its own that lasts
as long as the run, and a seeded generator; it returns what the bad rank sends.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Fault = Callable[[Tensor, Tensor, dict[str, Tensor], torch.Generator], Tensor]

NOISE = 5.0  # length of the Gaussian noise, in units of the bad rank's own gradient's
LITTLE = 1.5  # standard deviations from the mean in a-little-is-enough
PRODUCT = 10.0  # length of the inner-product manipulation, in units of the honest mean's


def _nan(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    return torch.full_like(own, torch.nan)


def _flip(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    return -own


def _times(factor: float) -> Fault:
    def scale(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
        return factor * own

    return scale


def _gaussian(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    noise = torch.randn(own.shape, generator=random).to(own)
    length: Tensor = NOISE * own.norm() / noise.norm()
    return noise * length


def _stuck(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    """Its first gradient for ever; several buckets of one step are told apart by their length."""
    return memory.setdefault(f"first {len(own)}", own.clone())


def _little(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    """Baruch et al., "A Little Is Enough", NeurIPS 2019: within the spread of the honest, against them."""
    return honest.mean(0) - LITTLE * honest.std(0)


def _product(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    """Xie, Koyejo, Gupta, "Fall of Empires", UAI 2019: so far against the honest mean that the average turns."""
    return -PRODUCT * honest.mean(0)


FAULTS: dict[str, Fault] = {
    "NaN": _nan,
    "sign flip": _flip,
    "x(-10)": _times(-10.0),
    "x1000": _times(1000.0),
    "Gaussian noise": _gaussian,
    "stuck at its first": _stuck,
    "a little is enough": _little,
    "inner product": _product,
}
