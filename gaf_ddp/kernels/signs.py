"""The signs that gradients are folded with: ±1 for each place of the model, the same on every rank and device.

Place n is element n mod B of block n div B, where B is about 128 Ki. Its sign is one of a table of 4 B, read from
the block's pseudo-random shift on, times the block's own. So the signs of a block are a slice of the table. They
vary per element: with one a row, gradients of rank one (batch 1, wide layers) have many times the error.
"""

import math
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

_BLOCK = 2**17

_Int = TypeVar("_Int", int, Tensor)


def signs_at(places: Tensor, size: int) -> Tensor:
    """Return the signs, int8, of elements at these places of the model `(N,)` int64: what all folds go by."""
    length = block_length(size)
    shift, sign = shift_and_sign(places // length, length)
    return (sign_table(size, torch.int8, places.device)[shift + places % length] * sign).to(torch.int8)


@cache
def period_of(size: int) -> int:
    """Return p, the largest prime up to size."""
    return next(p for p in range(size, 1, -1) if all(p % d for d in range(2, math.isqrt(p) + 1)))


def block_length(size: int) -> int:
    """Return B, the elements of a block: whole rows of p numbers, at least one."""
    return period_of(size) * max(1, _BLOCK // period_of(size))


@cache
def sign_table(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the signs `(4 B,)` that blocks of B elements read theirs from, made on the CPU once."""
    return (1 - 2 * (mix(torch.arange(4 * block_length(size))) & 1)).to(dtype).to(device)


@cache
def both_signs(size: int, device: torch.device) -> Tensor:
    """Return the table and behind it its negative, int8 `(8 B,)`: rows of blocks of sign −1 read from there."""
    table = sign_table(size, torch.int8, device)
    return torch.cat([table, -table])


def mix(x: _Int) -> _Int:
    """Return a pseudo-random number of 32 bits for each number below 2³²: Wellons' `lowbias32`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def shift_and_sign(block: _Int, length: int) -> tuple[_Int, _Int]:
    """Return where in the table a block's signs begin, and the sign of all of them."""
    number = mix(block ^ 0x5BD1E995)
    return (number >> 1) % (3 * length), 1 - 2 * (number & 1)
