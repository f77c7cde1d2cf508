"""The filtering core: the Gram matrix of W gradients and their weighted sum.

Both functions read each row once, in pieces, and hold no second copy of the rows. They know nothing of
processes; every rank calls them on the slice of the gradients it owns.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gaf_ddp.runtime.device import kernels, on_host

# Columns of one product. Float32 products drift with their length: over 5 M elements a plain `rows @ rows.T` was
# off by 2.7e-4; matrix products of 16 Ki columns, or dot products of 256 Ki, summed in float64, by less than 1e-6.
_COLUMNS, _DOT_COLUMNS = 16_384, 262_144
_DOT_ROWS = 8  # a CPU takes up to twice the time for matrix products so thin as for dot products
# A square below this, for each of its terms, may have lost digits to float32's smallest numbers.
_FLOOR = 1e-32
# Elements worked on, and converted to float32 or float64, at a time: what a CPU's cache holds, or fills a GPU.
_ON_CPU, _ON_ACCELERATOR = 2**19, 2**24


def gram(rows: Tensor) -> Tensor:
    """Return all inner products between the rows.

    Args:
        rows: `(W, n)` floating point, any device; n may be 0.

    Returns:
        `(W, W)` float64 on the rows' device. Products are added up in float32 or better, and once more in float64
        where rows are so long or short, beyond norms of 1e-12 to 1e18, that float32 could not hold their squares.
        A NaN or inf in row i shows in row and column i and nowhere else.

    Raises:
        ValueError: rows is no such matrix.
    """
    _require_rows(rows)
    fused = kernels(rows.device.type)
    if fused is not None and fused.can_gram(rows):
        fast: Tensor = fused.gram(rows)
        return fast
    if not on_host(rows):  # float32 products on an accelerator may silently use TF32, those in float64 never do
        return _matrix_products(rows, torch.float64)
    products = _dot_products(rows) if len(rows) <= _DOT_ROWS else _matrix_products(rows, _wide(rows))
    return _matrix_products(rows, torch.float64) if _out_of_range(products, rows) else products


def _dot_products(rows: Tensor) -> Tensor:
    """Return the Gramian by dot products, in pieces that stay in a CPU's cache for all of them."""
    wide = _wide(rows)
    total = [[0.0] * len(rows) for _ in rows]
    for piece in torch.split(rows, _DOT_COLUMNS, 1):
        vectors = piece.to(wide).unbind()
        for i, a in enumerate(vectors):
            for j, b in enumerate(vectors[: i + 1]):
                total[i][j] += torch.dot(a, b).item()
    ranks = range(len(rows))
    return torch.tensor([[total[max(i, j)][min(i, j)] for j in ranks] for i in ranks], dtype=torch.float64)


def _matrix_products(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Gramian by matrix products in dtype of `_COLUMNS` columns, and one of the rest."""
    columns = max((_ON_CPU if on_host(rows) else _ON_ACCELERATOR) // len(rows), 1024)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for piece in torch.split(rows, columns, 1):
        part = piece.to(dtype)
        whole = part.shape[1] // _COLUMNS * _COLUMNS
        # (blocks, W, columns), a view
        blocks = torch.unflatten(part[:, :whole], 1, (-1, _COLUMNS)).transpose(0, 1)
        rest = part[:, whole:]
        with torch.autocast(part.device.type, enabled=False):
            total += torch.bmm(blocks, blocks.mT).double().sum(0) + (rest @ rest.mT).double()
    return total


def _out_of_range(products: Tensor, rows: Tensor) -> bool:
    """Return whether a row that is finite and not zero has a square that float32 products cannot tell."""
    lost = [
        row
        for row, square in zip(rows, products.diagonal().tolist(), strict=True)
        if not len(row) * _FLOOR <= square < math.inf and row.dtype != torch.float64
    ]
    return any(0 < torch.linalg.vector_norm(row, math.inf).item() < math.inf for row in lost if len(row))


def combine(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the weighted sum of the rows, `weights @ rows`, leaving out rows of weight 0.

    A left-out row is never multiplied, so NaN and inf in it do not reach the result.

    Args:
        rows: `(W, n)` floating point, any device.
        weights: `(W,)` floating point, same device. A NaN weight makes the result NaN.
        out: `(n,)` tensor to write into, of any floating dtype; may be the memory of one of the rows. Allocated
            in the rows' dtype if None.

    Returns:
        `(n,)`, summed in float32 (float64 for float64 rows), then rounded once to out's dtype.

    Raises:
        ValueError: rows is no such matrix, or weights or out do not fit it.
    """
    _require_rows(rows)
    if weights.shape != (len(rows),):
        raise ValueError(f"weights must have shape ({len(rows)},), one per row, found {tuple(weights.shape)}")
    if out is None:
        out = torch.empty_like(rows[0])
    if out.shape != rows[0].shape:
        raise ValueError(f"out must have shape ({len(rows[0])},), found {tuple(out.shape)}")
    fused = kernels(out.device.type)
    if fused is not None and fused.can_combine(rows, out):
        combined: Tensor = fused.combine(rows, weights, out)
        return combined
    return (_combine_on_host if on_host(out) else _combine_on_accelerator)(rows, weights, out)


def _combine_on_host(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write the sum into out; the weights are at hand, so rows of weight 0 are not even read."""
    kept = [(row, weight) for row, weight in zip(rows, weights.tolist(), strict=True) if weight != 0.0]
    if not kept:
        return out.zero_()
    kept.sort(key=lambda pair: pair[0].data_ptr() != out.data_ptr())  # a row that out overwrites is read first
    wide, factors = _wide(rows), [weight for _, weight in kept]
    in_out = out.dtype == rows.dtype == wide
    if in_out and len(kept) == 2 and sum(factors) == 1:  # in one pass
        return torch.lerp(kept[0][0], kept[1][0], factors[1], out=out)
    pieces = zip(*(torch.split(row, _DOT_COLUMNS) for row, _ in kept), strict=True)
    for (first, *others), target in zip(pieces, torch.split(out, _DOT_COLUMNS), strict=True):
        total = torch.mul(first, factors[0], out=target) if in_out else first.to(wide) * factors[0]
        for row, factor in zip(others, factors[1:], strict=True):
            total.add_(row, alpha=factor)
        if not in_out:
            target.copy_(total)
    return out


def _combine_on_accelerator(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write the sum into out without waiting for the device: what a weight is, the host does not know."""
    columns = max(_ON_ACCELERATOR // len(rows), 1024)
    for piece, target in zip(torch.split(rows, columns, 1), torch.split(out, columns), strict=True):
        total = torch.zeros_like(target, dtype=_wide(rows))
        for row, weight in zip(piece, weights.to(total.dtype), strict=True):
            total.addcmul_(torch.where(weight != 0, row, 0).to(total.dtype), weight)
        target.copy_(total)
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


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _require_rows(rows: Tensor) -> None:
    if rows.dim() != 2 or len(rows) == 0 or not rows.dtype.is_floating_point:
        found = f"{tuple(rows.shape)} of {rows.dtype}"
        raise ValueError(f"rows must be a floating point matrix (W, n), found {found}")
