"""What a rank sends at the end of a step, and how all ranks' ballots are read.

A ballot is the sketch `(k,)` of the rank's gradient in float32, sometimes two of held-out data behind it, and numbers
in float64: the squared norm of each bucket, and what the rank was told and found (`Told`). It has 4 k + 8 (buckets +
some 20) bytes, with held-out data 8 k more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gaf_ddp.runtime.device import to_device

_FREE = 2**18  # bytes of ballots that a rank may receive in every step, however small its gradient is
_MOST_STEPS = 8  # of a ballot: with so many, nothing was lost in any task that was tried
_PART = 0.01  # of the gradient's bytes, which ballots may take


@dataclass
class Told:
    """What a ballot says beside the gradient.

    Attributes:
        finished: whether the rank waits for the others in DDP's Join, out of inputs.
        settings: a number for each setting that ranks must have alike, each exact in float64.
        hash: of the parameters' bits, int64 `()` on the device; None where it is not asked for.
        off: how far the last checked sum was off, `()` float64 on the device; None where none was checked.
        referenced: the number of the reading of held-out data that waits for a later ballot; 0 where none does.
        loss: of the reading in this ballot, `()` float64 on the device; None where there is none.
    """

    finished: bool
    settings: Sequence[float]
    hash: Tensor | None
    off: Tensor | None
    referenced: int
    loss: Tensor | None


class Numbers(NamedTuple):
    """All ranks' ballots but for the sketches, float64.

    Attributes:
        squares: `(W, buckets)`, squared norms.
        finished: `(W,)`, 1 where a rank waits in DDP's Join.
        hashes: `(W, 2)`, the halves of the parameters' hash; zeros where it was not asked for.
        off: `(W,)`, how far the last checked sum was off; zeros where none was checked.
        referenced: `(W,)`, the number of the reading of held-out data that waits; 0 where none does.
        loss: `(W,)`, of the readings in these ballots; NaN where there is none.
        settings: `(W, settings)`.
        total: `(W,)`, squared norms of the whole gradients: of all that ranks of a replica hold.
        unlike: `(W,)`, not 0 where ranks of one replica were told unlike things.
    """

    squares: Tensor
    finished: Tensor
    hashes: Tensor
    off: Tensor
    referenced: Tensor
    loss: Tensor
    settings: Tensor
    total: Tensor
    unlike: Tensor


def pack(sketch: Tensor, squares: Tensor, total: Tensor, unlike: Tensor | None, told: Told) -> Tensor:
    """Return a ballot as int32 numbers, which collectives of every backend take; some five launches.

    Args:
        sketch: `(k,)` float32.
        squares: `(buckets,)` float64, squared norms.
        total: `()` float64, that of the whole gradient.
        unlike: `()` float64, as `Numbers` has it; None where a replica is one rank.
        told: what else it says.
    """
    device = sketch.device
    first = float(told.finished), 0, 0, 0, float(told.referenced), math.nan, 0
    known = torch.tensor([*first, *told.settings], dtype=torch.float64)
    known = to_device(known, device)
    if told.hash is not None:
        known[1:3] = torch.stack([told.hash >> 32, told.hash & 0xFFFFFFFF])  # halves are exact in float64
    if told.off is not None:
        known[3] = told.off
    if told.loss is not None:
        known[5] = told.loss
    if unlike is not None:
        known[6] = unlike
    numbers = torch.cat([squares, total.view(1), known])
    return torch.cat([sketch.view(torch.int32), numbers.view(torch.int32)])


def unpack(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the first `(W, size)` float32, and the numbers behind them, float64, of all ranks' ballots `(W, …)`."""
    return rows[:, :size].view(torch.float32), rows[:, size:].contiguous().view(torch.float64)


def read(numbers: Tensor, buckets: int) -> Numbers:
    """Name the numbers `(W, …)` of ballots on so many buckets."""
    squares, total, told = numbers[:, :buckets], numbers[:, buckets], numbers[:, buckets + 1 :]
    finished, off, referenced, loss, unlike = (told[:, column] for column in (0, 3, 4, 5, 6))
    return Numbers(squares, finished, told[:, 1:3], off, referenced, loss, told[:, 7:], total, unlike)


def affordable(world_size: int, size: int, gradient: float) -> int:
    """Return how many steps go into a ballot, so that ballots are a hundredth of the gradient's bytes."""
    ballots = 4 * world_size * size
    return 1 if ballots <= _FREE else min(_MOST_STEPS, max(1, math.ceil(ballots / (_PART * max(gradient, 1)))))
