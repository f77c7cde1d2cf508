"""The filtering core: the Gram matrix of W gradients and their weighted sum.

Both functions read each row once, in chunks, and hold no second copy of the rows. They know nothing of
processes; every rank calls them on the slice of the gradients it owns.
"""

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

# Columns of one product. Float32 dot products drift with their length: over 5 M elements a plain `rows @ rows.T`
# was off by 2.7e-4; products of 16 Ki columns summed in float64 are off by 2e-7, and faster.
_COLUMNS = 16_384
# Elements worked on, and converted to float32 or float64, at a time: what a CPU's cache holds, or fills a GPU.
_ON_CPU, _ON_ACCELERATOR = 2**19, 2**24


def gram(rows: Tensor) -> Tensor:
    """Return all inner products between the rows.

    Args:
        rows: `(W, n)` floating point, any device; n may be 0.

    Returns:
        `(W, W)` on the rows' device, float32 (float64 for float64 rows), accumulated in float32 or better.
        A NaN or inf in row i shows in row and column i and nowhere else.

    Raises:
        ValueError: rows is not a floating point matrix.
    """
    _require_matrix(rows)
    fused = kernels(rows.device.type)
    if fused is not None and fused.can_gram(rows):
        products: Tensor = fused.gram(rows)
        return products
    wide = _wide(rows)
    # Matrix products on an accelerator may silently use TF32, float64 never does.
    product = torch.float32 if rows.device.type == "cpu" and wide == torch.float32 else torch.float64
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk in _chunks(rows):
            total += _gram_of_chunk(chunk.to(product))
    return total.to(wide)


def _gram_of_chunk(rows: Tensor) -> Tensor:
    """Return the float64 Gramian of rows `(W, n)`, as a batch of products over `_COLUMNS` columns and a rest."""
    if len(rows) == 2 and rows.device.type == "cpu":  # a matrix product so thin takes twice the time
        return _gram_of_two(*rows)
    whole = rows.shape[1] // _COLUMNS * _COLUMNS
    blocks = torch.unflatten(rows[:, :whole], 1, (-1, _COLUMNS)).transpose(
        0, 1
    )  # (n / columns, W, columns), a view
    rest = rows[:, whole:]
    return torch.bmm(blocks, blocks.mT).double().sum(0) + (rest @ rest.mT).double()


def _gram_of_two(a: Tensor, b: Tensor) -> Tensor:
    """Return the float64 Gramian `(2, 2)` of two vectors, in pieces that stay in the cache for three products."""
    aa = ab = bb = 0.0
    for x, y in zip(torch.split(a, 4 * _COLUMNS), torch.split(b, 4 * _COLUMNS), strict=True):
        aa, ab, bb = aa + float(torch.dot(x, x)), ab + float(torch.dot(x, y)), bb + float(torch.dot(y, y))
    return torch.tensor([[aa, ab], [ab, bb]], dtype=torch.float64)


def combine(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the weighted sum of the rows, `weights @ rows`, leaving out rows of weight 0.

    A left-out row is never multiplied, so NaN and inf in it do not reach the result.

    Args:
        rows: `(W, n)` floating point, any device.
        weights: `(W,)` floating point, same device. A NaN weight makes the result NaN.
        out: `(n,)` tensor to write into, of any floating dtype; may be one of the rows' own memory only for
            W = 1. Allocated in the rows' dtype if None.

    Returns:
        `(n,)`, summed in float32 (float64 for float64 rows), then rounded once to out's dtype.

    Raises:
        ValueError: rows is not a floating point matrix, or weights or out do not fit it.
    """
    _require_matrix(rows)
    if weights.shape != rows.shape[:1]:
        raise ValueError(f"weights must have shape ({len(rows)},), one per row, found {tuple(weights.shape)}")
    if out is None:
        out = torch.empty_like(rows[0])
    if out.shape != rows.shape[1:]:
        raise ValueError(f"out must have shape ({rows.shape[1]},), found {tuple(out.shape)}")
    fused = kernels(rows.device.type)
    if fused is not None and fused.can_combine(rows, out):
        combined: Tensor = fused.combine(rows, weights, out)
        return combined
    wide = _wide(rows)
    if out.dtype == rows.dtype == wide:
        return _weighted_sum(rows, weights, out)
    for chunk, (target,) in zip(_chunks(rows), _chunks(out[None], len(rows)), strict=True):
        target.copy_(_weighted_sum(chunk.to(wide), weights, torch.empty_like(target, dtype=wide)))
    return out


def filter_gradients(rows: Tensor, weighting: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradients' filtered average: `combine(rows, weights)` with the weights of the rows' Gramian.

    Args:
        rows: `(W, n)`, one gradient per row.
        weighting: Gramian `(W, W)` to weights `(W,)`, e.g. `NeighborhoodAgreement(tau=0.9)`.

    Returns:
        `(n,)` in the rows' dtype; zeros when nothing agrees.
    """
    return combine(rows, weighting(gram(rows)))


@cache
def kernels(device_type: str) -> ModuleType | None:
    """Return the fused kernels of `_triton.py` for a device type, or None where plain torch does the work.

    They run on NVIDIA GPUs where Triton is installed; the environment variable `GAF_DDP_TRITON=0` turns them off.
    """
    if device_type != "cuda" or torch.version.hip is not None or os.environ.get("GAF_DDP_TRITON") == "0":
        return None
    try:
        from gaf_ddp import _triton
    except ImportError:
        return None
    return _triton


def _weighted_sum(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write the weighted sum of rows into out, all of one dtype."""
    if rows.device.type == "cpu":  # the weights are at hand: rows of weight 0 are not even read
        kept = [(i, w) for i, w in enumerate(weights.tolist()) if w != 0.0]
        if not kept:
            return out.zero_()
        if len(kept) == len(rows) > 3:  # in one pass over out
            return torch.mv(rows.T, weights.to(rows.dtype), out=out)
        (first, weight), *rest = kept
        torch.mul(rows[first], weight, out=out)
        for i, weight in rest:
            out.add_(rows[i], alpha=weight)
        return out
    torch.mul(_masked(rows[0], weights[0]), weights[0], out=out)
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        out.addcmul_(_masked(row, weight), weight.to(out.dtype))
    return out


def _masked(row: Tensor, weight: Tensor) -> Tensor:
    """Return the row, or zeros if its weight is 0, without waiting for the device."""
    return torch.where(weight != 0, row, 0)


def _chunks(rows: Tensor, count: int | None = None) -> tuple[Tensor, ...]:
    """Cut the columns of rows as those of a matrix of count rows, by default its own."""
    elements = _ON_CPU if rows.device.type == "cpu" else _ON_ACCELERATOR
    return torch.split(rows, max(elements // max(count or len(rows), 1), 1024), dim=1)


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _require_matrix(rows: Tensor) -> None:
    if rows.dim() != 2 or not rows.dtype.is_floating_point:
        raise ValueError(f"rows must be a floating point matrix (W, n), found {tuple(rows.shape)} of {rows.dtype}")
