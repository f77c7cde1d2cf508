"""The fold in Triton, for accelerators: x is read once, in two launches. Its reference is fold.py.

The sums are deterministic: no atomics, partial sums in a fixed order. Squares are float64: where a GPU has little of
that (A10, L40S, B300) they, and not the memory, should set the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gaf_ddp.kernels.gram_triton import OPTIONS, programs_on
from gaf_ddp.kernels.signs import both_signs
from gaf_ddp.kernels.spans import Spans, row_table

WARPS, _TILE = 8, 2048  # of a program of the first launch, and elements of x that it has in registers
ADD_WARPS, ADD_TILE = 4, {"ROWS": 32, "COLUMNS": 32}  # of the second: narrow, so that many programs share the work


def can_fold(x: Tensor) -> bool:
    """Return whether `fold` and `fold_into` take this vector."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.is_contiguous()


def fold(x: Tensor, spans: Spans, size: int) -> tuple[Tensor, Tensor]:
    """Return the sketch `(k,)` float32 and the squared norm `()` float64 of x `(N,)`; two launches, no host sync.

    It reads N elements and writes k float32 a program. The first call with these spans makes their table on the
    host and waits while it is copied.
    """
    sketch = torch.empty(size, dtype=torch.float32, device=x.device)
    square = torch.empty((), dtype=torch.float64, device=x.device)
    _fold(x, spans, sketch, square, add=False)
    return sketch, square


def fold_into(x: Tensor, spans: Spans, sketch: Tensor, square: Tensor) -> None:
    """Add x's sketch to sketch `(k,)` float32 and its squared norm to square `()` float64; two launches."""
    _fold(x, spans, sketch, square, add=True)


def _fold(x: Tensor, spans: Spans, sketch: Tensor, square: Tensor, add: bool) -> None:
    size = len(sketch)
    table, fixed = row_table(spans, size, x.device), constants(size)
    tiles = triton.cdiv(size, fixed["COLUMNS"])
    programs = max(1, min(programs_on(x.device) // tiles, triton.cdiv(len(table), fixed["ROWS"])))
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    squares = torch.empty(programs, tiles, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _fold_kernel[(programs, tiles)](
            x, table, both_signs(size, x.device), partial, squares, len(table), **fixed, num_warps=WARPS, **OPTIONS
        )
        _add_kernel[(triton.cdiv(size, ADD_TILE["COLUMNS"]) + 1,)](
            partial, squares, sketch, square, programs, programs * tiles,
            SIZE=size, ADD=add, **ADD_TILE, num_warps=ADD_WARPS, **OPTIONS,
        )  # fmt: skip


def constants(size: int) -> dict[str, int]:
    """Return what the first kernel is compiled for."""
    columns = min(triton.next_power_of_2(size), _TILE // 2)
    return {"SIZE": size, "ROWS": _TILE // columns, "COLUMNS": columns}


# Rows begin at any element, so that x's alignment helps nobody, and one program serves all numbers of rows.
@triton.jit(do_not_specialize=["x", "rows"])
def _fold_kernel(
    x, table, signs, partial, squares, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum a tile of columns over every programs-th group of rows; columns beyond p are in no row, so zeros."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    square = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        entry, exists = table + row * 4, row < rows
        start = tl.load(entry, mask=exists, other=0)  # column 0 may be before x, and is then before low
        low = tl.load(entry + 1, mask=exists, other=0).to(tl.int32)
        high = tl.load(entry + 2, mask=exists, other=0).to(tl.int32)
        shift = tl.load(entry + 3, mask=exists, other=0)
        inside = (column >= low) & (column < high)
        numbers = tl.load(x + (start + column), mask=inside, other=0.0).to(tl.float32)
        total += numbers * tl.load(signs + (shift + column), mask=inside, other=0).to(tl.float32)
        square += numbers.to(tl.float64) * numbers.to(tl.float64)  # float32 holds no squares of 1e-30 or 1e30
    at = tl.program_id(0) * SIZE + column
    tl.store(partial + at, tl.sum(total, axis=0)[None, :], mask=column < SIZE)
    tl.store(squares + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(square))


@triton.jit(do_not_specialize=["programs", "pieces"])
def _add_kernel(
    partial, squares, sketch, square, programs, pieces,
    SIZE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the programs' sums in float64: the last program the squares, each other a few columns."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        total = tl.zeros((ROWS * COLUMNS,), dtype=tl.float64)
        for first in range(0, pieces, ROWS * COLUMNS):
            piece = first + tl.arange(0, ROWS * COLUMNS)
            total += tl.load(squares + piece, mask=piece < pieces, other=0.0)
        result = tl.sum(total)
        if ADD:
            result += tl.load(square)
        tl.store(square, result)
    else:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
        for first in range(0, programs, ROWS):
            row = first + tl.arange(0, ROWS)[:, None]
            inside = (row < programs) & (column < SIZE)[None, :]
            sums += tl.load(partial + row * SIZE + column[None, :], mask=inside, other=0.0).to(tl.float64)
        folded = tl.sum(sums, axis=0)
        if ADD:
            folded += tl.load(sketch + column, mask=column < SIZE, other=0.0).to(tl.float64)
        tl.store(sketch + column, folded.to(tl.float32), mask=column < SIZE)
