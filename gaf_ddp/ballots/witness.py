"""What held-out data are held against: the sum of each voter's gradients since the last reading, on the device."""

import math

import torch
from torch import Tensor

from gaf_ddp.rules.medians import upper_median

_LONGEST = 10.0  # median lengths, to which a ballot's gradient is cut in the sums


class Witness:
    """The sums of V voters; there are none before the first reading, and nothing is computed until then.

    Attributes:
        sums: `(V, k)` float32, or None.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, gradients: Tensor) -> None:
        """Add a ballot's gradients, sketches `(V, k)` float32; with another V all begins anew."""
        if self.sums is None or self.sums.shape != gradients.shape:
            self.sums = None
            return
        lengths = torch.linalg.vector_norm(gradients, dim=1)
        cut = (_LONGEST * upper_median(lengths, lengths > 0) / lengths).clamp(max=1)
        self.sums = self.sums.to(gradients.device) + torch.where(lengths > 0, cut, 0)[:, None] * gradients

    def compare(self, like: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `cosines_with` says of the sums, and begin new ones, of the shape of like `(V, k)`."""
        found = cosines_with(torch.zeros_like(like) if self.sums is None else self.sums, shares)
        self.sums = torch.zeros_like(like)
        return found


def cosines_with(gradients: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines of voters' gradients with both readings of held-out data, and what is signal in these.

    Nothing waits for an accelerator; some twenty launches.

    Args:
        gradients: `(V, k)` float32, sketches of what each voter's gradients add up to.
        shares: `(W, 2, k)` float32, sketches of each rank's share of the two readings. One that is not finite counts
            as none. One that is longer than the upper median length is shortened to it, so that no rank alone is the
            witness.

    Returns:
        Cosines `(2, V)` float64, NaN beside a voter without a gradient, and where nobody has a share. And of each
        reading `(2,)` what part of the squared length of shares they have in common in expectation, 1 where there is
        one share: with n shares, (|Σ shares|² / Σ |share|² − 1) / (n − 1).
    """
    wide = shares.double()
    wide = torch.where(wide.isfinite().all(-1, keepdim=True), wide, 0)
    lengths = torch.linalg.vector_norm(wide, dim=-1)  # (W, 2)
    factor = (upper_median(lengths, lengths > 0) / lengths).clamp(max=1)
    wide = wide * torch.where(lengths > 0, factor, 0)[..., None]
    readings, sums, number = wide.sum(0), gradients.double(), (lengths > 0).sum(0)
    squares = readings.square().sum(1)
    signal = torch.where(number > 1, (squares / wide.square().sum((0, 2)) - 1) / (number - 1), 1)
    scale = squares.sqrt()[:, None] * torch.linalg.vector_norm(sums, dim=1)
    return torch.where(scale > 0, readings @ sums.mT / scale, math.nan), signal
