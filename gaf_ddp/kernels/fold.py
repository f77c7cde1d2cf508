"""Sketches: gradients folded into k numbers that keep their inner products, by which ranks can be judged.

`sketch[j] = Σ s(n) · g[n]` over the elements n of the model's gradient with `n mod p = j`. The signs s(n) of ±1 are
the same on every rank and device, and p is the largest prime that k holds; the few numbers beyond it are 0. The
sketch is linear, and an inner product of two sketches is that of the gradients to a standard error of |x||y|/√k.

An element's sign and column follow from its place in the model alone. So any part of a gradient can be folded by
itself, and what engines make of it does not matter: their buckets, units and parameters add up to the same sketch.

Signs vary per element: with one a row, gradients of rank one (batch 1, wide layers) have many times the error. A
prime, since in rows of 4096 layers of width 128 or 1024 put the same unit into the same column again and again.
Place n is element n mod B of block n div B, where B is about 128 Ki. Its sign is one of a table of 4 B, read from the
block's pseudo-random shift on, times the block's own. So a CPU folds a block in one fused multiply-add, and block,
table and sum stay in its second-level cache.
"""

import math
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gaf_ddp.runtime.device import kernels, on_host

_BLOCK = 2**17
_SAFE_NORMS = 1e-15, 1e18  # float32 holds the squares of what lies between

_Int = TypeVar("_Int", int, Tensor)


class Span(NamedTuple):
    """Elements of a vector that follow each other in the model too.

    Attributes:
        first: where they begin in the vector.
        place: where they begin in the model, from 0 to 2^47.
        count: how many they are.
    """

    first: int
    place: int
    count: int


Spans = tuple[Span, ...]


def fold(x: Tensor, spans: Spans, size: int) -> tuple[Tensor, Tensor]:
    """Return the sketch of x and its squared norm; a CPU takes about a copy's time, a GPU one reading of x.

    Args:
        x: `(N,)` floating point, contiguous, any device; N may be 0.
        spans: where its elements are in the model; every element is in one span.
        size: k, numbers of the sketch, at least 64.

    Returns:
        The sketch `(k,)`, float32, summed in float32 or better, and the squared norm `()`, float64, which is right
        from 1e-38 to 1e38 and finite exactly where x is. Where x is not, the sketch has NaN or inf.

    Raises:
        ValueError: x is no floating point vector, spans do not cover it, or size is less than 64.
    """
    if x.dim() != 1 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be a floating point vector (N,), found {tuple(x.shape)} of {x.dtype}")
    if size < 64:
        raise ValueError(f"size must be at least 64 numbers, found {size}")
    if sum(span.count for span in spans) != len(x):
        raise ValueError(f"spans must cover x, found {sum(span.count for span in spans)} of {len(x)} elements")
    fused = kernels(x.device.type, "fold_triton")
    if fused is not None and fused.can_fold(x):
        folded: tuple[Tensor, Tensor] = fused.fold(x, spans, size)
        return folded
    return (_fold_on_cpu if on_host(x) else _fold_on_accelerator)(x, spans, size)


def whole(count: int) -> Spans:
    """Return the spans of a vector that is all there is."""
    return (Span(0, 0, count),)


def _fold_on_cpu(x: Tensor, spans: Spans, size: int) -> tuple[Tensor, Tensor]:
    """Add up all blocks with their signs, each while it is in the cache, then the rows of their sum."""
    table = sign_table(size, torch.float32, x.device)
    total = torch.zeros(block_length(size))
    square = 0.0
    for begin, end, pieces in _plan(spans, size):
        numbers = x[begin:end].float()
        for first, last, offset, shift, sign in pieces:
            signs = table[shift : shift + last - first]
            total[offset : offset + last - first].addcmul_(numbers[first:last], signs, value=sign)
        square += _square(numbers)
    sketch = total.view(-1, period_of(size)).sum(0)
    return torch.nn.functional.pad(sketch, (0, size - len(sketch))), torch.tensor(square, dtype=torch.float64)


def _square(x: Tensor) -> float:
    """Return the squared norm of a float32 vector on the CPU, in float64 where float32 holds no such squares."""
    norm = torch.linalg.vector_norm(x).item()
    if not _SAFE_NORMS[0] < norm < _SAFE_NORMS[1]:
        norm = torch.linalg.vector_norm(x, dtype=torch.float64).item()
    return norm * norm


@lru_cache(maxsize=1024)
def _plan(spans: Spans, size: int) -> list[tuple[int, int, list[tuple[int, int, int, int, int]]]]:
    """Cut a vector into parts of a block's length, and these where blocks of the model begin.

    Returns:
        Of each part where it begins and ends in the vector, and its pieces: where each begins and ends in the part,
        its offset in the block, where its signs begin in the table, and the block's sign.
    """
    length = block_length(size)
    parts: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for first, place, count in spans:
        done = 0
        while done < count:
            part, offset = (first + done) // length, (place + done) % length
            shift, sign = _shift_and_sign((place + done) // length, length)
            piece = min(count - done, length - offset, (part + 1) * length - (first + done))
            begin = first + done - part * length
            parts.setdefault(part, []).append((begin, begin + piece, offset, shift + offset, sign))
            done += piece
    return [(part * length, part * length + max(p[1] for p in pieces), pieces) for part, pieces in parts.items()]


def _fold_on_accelerator(x: Tensor, spans: Spans, size: int) -> tuple[Tensor, Tensor]:
    """Fold by copies into rows of p columns, without waiting for the device; as long as x in memory again."""
    period = period_of(size)
    starts, begin = [], 0
    for span in spans:
        starts.append(begin + span.place % period)
        begin += rows_in(span, period) * period
    rows = torch.zeros(begin, dtype=torch.float32, device=x.device)
    torch._foreach_copy_(
        [rows[start : start + span.count] for start, span in zip(starts, spans, strict=True)],
        [x[span.first : span.first + span.count] for span in spans],
    )
    signed = rows.view(-1, period) * _signs_of_rows(spans, size, x.device)
    sketch = signed.sum(0, dtype=torch.float64).float()
    square = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    return torch.nn.functional.pad(sketch, (0, size - period)), square


@lru_cache(maxsize=256)
def _signs_of_rows(spans: Spans, size: int, device: torch.device) -> Tensor:
    """Return the signs `(rows, p)`, int8, of all rows that the spans touch."""
    columns = torch.arange(period_of(size), device=device)
    return both_signs(size, device)[row_table(spans, size, device)[:, 3:] + columns]


def rows_in(span: Span, period: int) -> int:
    """Return how many rows of p columns a span touches."""
    return -(-(span.place % period + span.count) // period)


@lru_cache(maxsize=256)
def row_table(spans: Spans, size: int, device: torch.device) -> Tensor:
    """Return the rows of p columns that a vector is folded as, int64 `(rows, 4)`.

    Of each row: which element of the vector its column 0 would be, may be negative; the first column that holds an
    element, and the one after the last; where its signs begin in `both_signs`.
    """
    period, length = period_of(size), block_length(size)
    rows = []
    for first, place, count in spans:
        for row in range(place // period, place // period + rows_in(Span(first, place, count), period)):
            start = row * period
            low, high = max(place - start, 0), min(place + count - start, period)
            shift, sign = _shift_and_sign(start // length, length)
            rows.append(
                (first + start - place, low, high, shift + start % length + (4 * length if sign < 0 else 0))
            )
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(device)


def signs_at(places: Tensor, size: int) -> Tensor:
    """Return the signs, int8, of elements at these places of the model `(N,)` int64: what all folds go by."""
    length = block_length(size)
    shift, sign = _shift_and_sign(places // length, length)
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


def _shift_and_sign(block: _Int, length: int) -> tuple[_Int, _Int]:
    """Return where in the table a block's signs begin, and the sign of all of them."""
    number = mix(block ^ 0x5BD1E995)
    return (number >> 1) % (3 * length), 1 - 2 * (number & 1)


def spans_of(counts: Iterable[tuple[int, int]]) -> Spans:
    """Return the spans of a vector of parts `(place, count)` that follow each other in it; merge neighbours."""
    spans: list[Span] = []
    first = 0
    for place, count in counts:
        last = spans[-1] if spans else None
        if last is not None and last.place + last.count == place:
            spans[-1] = last._replace(count=last.count + count)
        elif count:
            spans.append(Span(first, place, count))
        first += count
    return tuple(spans)
