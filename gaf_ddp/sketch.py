"""Sketches: gradients folded into k numbers that keep their inner products, by which ranks can be judged.

`sketch[j] = Σ_m s(m·p + j) · x[m·p + j]`, with signs s of ±1 that are the same on every rank and device, and p the
largest prime that k holds (the few numbers beyond it are 0). It is linear, and an inner product of two sketches is
that of the gradients to a standard error of about |x||y|/√k. Distances are best taken between sketches alone,
|S(x − y)|: with exact norms beside sketched products, gradients that are near each other lose theirs.

Signs vary per element: with one a row, gradients of rank one (batch 1, wide layers) have many times the error. A
prime, since in rows of 4096 layers of width 128 or 1024 put the same unit into the same column again and again.
Element n is at place n mod B of block n div B, where B is about 256 Ki; its sign is one of a table of 4 B, read
from the block's pseudo-random shift on, times the block's own. So a CPU folds a block in one fused multiply-add.
"""

import math
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from gaf_ddp.device import kernels, on_host

_BLOCK = 2**18  # elements of one multiply-add, for which a call costs a CPU little, and in its cache
_ON_ACCELERATOR = 2**24  # elements whose signs are written out at a time
_SAFE_SQUARE = 1e-25  # a block's sum of squares above has lost less than 1e-7 of itself below float32's range

_Int = TypeVar("_Int", int, Tensor)


def fold(x: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sketch of x and its squared norm; costs a CPU one to two copies of x, a GPU one reading.

    Args:
        x: `(N,)` floating point, any device; N may be 0.
        size: k, numbers of the sketch, at least 64.
        seed: chooses the signs, e.g. a bucket's number, as sketches of different seeds may be added up.

    Returns:
        The sketch `(k,)`, float32, summed in float32 or better, and the squared norm `()`, float64, which is right
        from 1e-38 to 1e38 and finite exactly where x is. Where x is not, the sketch has NaN or inf.

    Raises:
        ValueError: x is no floating point vector, or size is less than 64.
    """
    if x.dim() != 1 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be a floating point vector (N,), found {tuple(x.shape)} of {x.dtype}")
    if size < 64:
        raise ValueError(f"size must be at least 64 numbers, found {size}")
    fused = kernels(x.device.type, "_triton_sketch")
    if fused is not None and fused.can_fold(x):
        folded: tuple[Tensor, Tensor] = fused.fold(x, size, seed)
        return folded
    return (_fold_on_cpu if on_host(x) else _fold_on_accelerator)(x, size, seed)


def _fold_on_cpu(x: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Add up all blocks with their signs, each while it is in the cache, then the rows of their sum."""
    period, length, square = period_of(size), block_length(size), 0.0
    table = sign_table(length, torch.float32, x.device)
    rows = torch.zeros(min(length // period, max(-(-len(x) // period), 1)), period)
    total = rows.view(-1)
    for block, piece in enumerate(torch.split(x, length)):
        numbers, (shift, sign) = piece.float(), _shift_and_sign(block, length, key_of(seed))
        total[: len(piece)].addcmul_(numbers, table[shift : shift + len(piece)], value=sign)
        square += _square(numbers)
    return _padded(rows.sum(0), size), torch.tensor(square, dtype=torch.float64)


def _square(x: Tensor) -> float:
    """Return the squared norm of a float32 vector on the CPU; scaled, where its squares leave float32's range."""
    square = x.square().sum().item()  # to 1e-7; a dot product of so many was up to 3e-5 off
    if _SAFE_SQUARE < square < math.inf or not len(x):
        return square
    largest = x.abs().max().item()
    return (x / largest).square().sum().item() * largest**2 if largest else 0.0


def _fold_on_accelerator(x: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fold by the signs written out, without waiting for the device."""
    period, length = period_of(size), block_length(size)
    blocks = max(_ON_ACCELERATOR // length, 1)
    total = torch.zeros(period, dtype=torch.float64, device=x.device)
    square = total.new_zeros(())
    for i, piece in enumerate(torch.split(x, blocks * length)):
        numbers = piece.float() * signs(len(piece), size, seed, x.device, i * blocks)
        total += _padded(numbers, -(-len(piece) // period) * period).view(-1, period).sum(0)
        square += numbers.double().square().sum()
    return _padded(total.float(), size), square


def signs(count: int, size: int, seed: int, device: torch.device, first: int = 0) -> Tensor:
    """Return the signs `(count,)`, int8, of the elements from block `first` on: what all folds go by."""
    length = block_length(size)
    blocks = torch.arange(first, first + -(-count // length), device=device)[:, None]
    shift, sign = _shift_and_sign(blocks, length, key_of(seed))
    table = sign_table(length, torch.int8, device)
    return (table[shift + torch.arange(length, device=device)] * sign).flatten()[:count].to(torch.int8)


@cache
def period_of(size: int) -> int:
    """Return p, the largest prime up to size."""
    return next(p for p in range(size, 1, -1) if all(p % d for d in range(2, math.isqrt(p) + 1)))


def block_length(size: int) -> int:
    """Return B, the elements of a block: whole rows of p numbers, at least one."""
    return period_of(size) * max(1, _BLOCK // period_of(size))


@cache
def sign_table(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the signs `(4 B,)` that blocks of B elements read theirs from, made on the CPU once."""
    return (1 - 2 * (mix(torch.arange(4 * length)) & 1)).to(dtype).to(device)


def key_of(seed: int) -> int:
    """Return the 31 bits that go into each block's hash."""
    return mix(seed) >> 1


def mix(x: _Int) -> _Int:
    """Return a pseudo-random number of 32 bits for each number below 2³²: Wellons' `lowbias32`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _shift_and_sign(block: _Int, length: int, key: int) -> tuple[_Int, _Int]:
    """Return where in the table a block's signs begin, and the sign of all of them."""
    number = mix(block ^ key)
    return (number >> 1) % (3 * length), 1 - 2 * (number & 1)


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - len(x)))
