"""Sketches: gradients folded into k numbers that keep their inner products, by which ranks can be judged.

`sketch[j] = Σ s(n) · g[n]` over the elements n of the model's gradient with `n mod p = j`. The signs s(n) of ±1
are the same on every rank and device, and p is the largest prime that k holds; the few numbers beyond it are 0.
The sketch is linear: an inner product of two sketches is that of the gradients to a standard error of |x||y|/√k.

An element's sign and column follow from its place in the model alone. So any part of a gradient can be folded by
itself, and what engines make of it does not matter: their buckets, units and parameters add up to the same sketch.

A prime, since in rows of 4096 layers of width 128 or 1024 put the same unit into the same column again and again.
Signs are in signs.py. A CPU folds a block of them in one fused multiply-add, and block, table and sum stay in its
caches; a GPU folds row by row, whatever spans they come from.
"""

from functools import lru_cache

import torch
from torch import Tensor

from gaf_ddp.kernels.signs import block_length, both_signs, period_of, shift_and_sign, sign_table
from gaf_ddp.kernels.spans import Span, Spans, row_table, rows_in, spans_of, whole
from gaf_ddp.runtime.device import kernels, on_host

__all__ = ["Span", "Spans", "fold", "fold_into", "spans_of", "whole"]

_SAFE_SQUARES = 1e-30, 1e36  # of a block: float32 holds all its terms


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
    _require(x, spans, size)
    fused = kernels(x.device.type, "fold_triton")
    if fused is not None and fused.can_fold(x):
        folded: tuple[Tensor, Tensor] = fused.fold(x, spans, size)
        return folded
    return (_fold_on_cpu if on_host(x) else _fold_on_accelerator)(x, spans, size)


def fold_into(x: Tensor, spans: Spans, sketch: Tensor, square: Tensor) -> None:
    """Add the sketch of x and its squared norm to those of other parts of the gradient, in place.

    Args:
        x: `(N,)`, as in `fold`, and so are spans.
        spans: where its elements are in the model.
        sketch: `(k,)` float32, contiguous, on x's device; added to.
        square: `()` float64, on x's device; added to.

    Raises:
        ValueError: x and spans are not as `fold` takes them, or sketch and square not as said.

    It takes as long as `fold`: with Triton two launches, as one of them adds up partial sums anyway.
    """
    if sketch.dim() != 1 or sketch.dtype != torch.float32 or not sketch.is_contiguous():
        found = f"{tuple(sketch.shape)} of {sketch.dtype}"
        raise ValueError(f"sketch must be a contiguous vector (k,) of torch.float32, found {found}")
    if square.dim() != 0 or square.dtype != torch.float64:
        raise ValueError(f"square must be () of torch.float64, found {tuple(square.shape)} of {square.dtype}")
    _require(x, spans, len(sketch))
    fused = kernels(x.device.type, "fold_triton")
    if fused is not None and fused.can_fold(x):
        fused.fold_into(x, spans, sketch, square)
        return
    folded, norm = (_fold_on_cpu if on_host(x) else _fold_on_accelerator)(x, spans, len(sketch))
    sketch += folded
    square += norm


def _require(x: Tensor, spans: Spans, size: int) -> None:
    if x.dim() != 1 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be a floating point vector (N,), found {tuple(x.shape)} of {x.dtype}")
    if size < 64:
        raise ValueError(f"size must be at least 64 numbers, found {size}")
    if sum(span.count for span in spans) != len(x):
        raise ValueError(f"spans must cover x, found {sum(span.count for span in spans)} of {len(x)} elements")


def _fold_on_cpu(x: Tensor, spans: Spans, size: int) -> tuple[Tensor, Tensor]:
    """Add up all blocks with their signs, each while it is in the cache, then the rows of their sum."""
    table = sign_table(size, torch.float32, x.device)
    parts, columns = _plan(spans, size)
    total = torch.zeros(columns, dtype=torch.float32)
    square = 0.0
    for begin, end, pieces in parts:
        numbers = x[begin:end].float()
        square += _square(numbers, period_of(size))  # first: it brings them into the cache, on all cores
        for first, last, offset, shift, sign in pieces:
            signs = table[shift : shift + last - first]
            total[offset : offset + last - first].addcmul_(numbers[first:last], signs, value=sign)
    sketch = total.view(-1, period_of(size)).sum(0)
    return torch.nn.functional.pad(sketch, (0, size - len(sketch))), torch.tensor(square, dtype=torch.float64)


def _square(x: Tensor, columns: int) -> float:
    """Return the squared norm of a float32 vector on the CPU.

    Over a whole block of half precision numbers float32 was off by 7e-6, of equal numbers by 2e-4. So rows are
    added up in float64, to 1e-6 and 1e-5 with rows of 4093. So is all of a vector of no whole rows, the last part
    of a longer one, and what float32 holds no squares of.
    """
    if len(x) % columns == 0:
        norms = torch.linalg.vector_norm(x.view(-1, columns), dim=1).double()
        square: float = torch.dot(norms, norms).item()
        if _SAFE_SQUARES[0] < square < _SAFE_SQUARES[1]:
            return square
    norm: float = torch.linalg.vector_norm(x, dtype=torch.float64).item()
    return norm * norm


_Piece = tuple[int, int, int, int, int]


@lru_cache(maxsize=2**14)  # of parameters by themselves there are many
def _plan(spans: Spans, size: int) -> tuple[list[tuple[int, int, list[_Piece]]], int]:
    """Cut a vector into parts of a block's length, and these where blocks of the model begin.

    Returns:
        Of each part where it begins and ends in the vector, and its pieces: where each begins and ends in the
        part, its offset in the sum of blocks, where its signs begin in the table, and the block's sign. And how many
        numbers that sum has: a whole block's, but for short vectors no more rows than they touch.
    """
    length, period = block_length(size), period_of(size)
    parts: dict[int, list[_Piece]] = {}
    for first, place, count in spans:
        done = 0
        while done < count:
            part, offset = (first + done) // length, (place + done) % length
            shift, sign = shift_and_sign((place + done) // length, length)
            piece = min(count - done, length - offset, (part + 1) * length - (first + done))
            begin = first + done - part * length
            parts.setdefault(part, []).append((begin, begin + piece, offset, shift + offset, sign))
            done += piece
    offsets = [(offset, offset + last - first) for each in parts.values() for first, last, offset, *_ in each]
    row = min((first for first, _ in offsets), default=0) // period
    rows = -(-max((last for _, last in offsets), default=0) // period) - row
    moved = {part: [(a, b, c - row * period, d, e) for a, b, c, d, e in pieces] for part, pieces in parts.items()}
    cut = [(part * length, part * length + max(p[1] for p in pieces), pieces) for part, pieces in moved.items()]
    return cut, rows * period


def _fold_on_accelerator(x: Tensor, spans: Spans, size: int) -> tuple[Tensor, Tensor]:
    """Fold by copies into rows of p columns, without waiting for the device; as long as x in memory again."""
    period = period_of(size)
    starts, begin = [], 0
    for span in spans:
        starts.append(begin + span.place % period)
        begin += rows_in(span, period) * period
    rows = torch.zeros(begin, dtype=torch.float32, device=x.device)
    if spans:
        torch._foreach_copy_(
            [rows[start : start + span.count] for start, span in zip(starts, spans, strict=True)],
            [x[span.first : span.first + span.count] for span in spans],
        )
    signed = rows.view(-1, period).mul_(_signs_of_rows(spans, size, x.device))
    sketch = signed.sum(0, dtype=torch.float64).float()
    square = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    return torch.nn.functional.pad(sketch, (0, size - period)), square


@lru_cache(maxsize=2**14)
def _signs_of_rows(spans: Spans, size: int, device: torch.device) -> Tensor:
    """Return the signs `(rows, p)`, int8, of all rows that the spans touch."""
    columns = torch.arange(period_of(size), device=device)
    return both_signs(size, device)[row_table(spans, size, device)[:, 3:] + columns]
