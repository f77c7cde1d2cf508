"""The fold in Triton, for accelerators: x is read once. Its reference is `_fold_on_accelerator` in sketch.py.

The sums are deterministic: no atomics, partial sums in a fixed order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from gaf_ddp.kernels.fold import block_length, key_of, period_of, sign_table
from gaf_ddp.kernels.gram_triton import OPTIONS, programs_on

WARPS, _TILE = 8, 2048  # of a program, and elements of x that it has in registers


def can_fold(x: Tensor) -> bool:
    """Return whether `fold` takes this vector."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.is_contiguous()


def fold(x: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sketch `(k,)` float32 and the squared norm `()` float64; reads N elements, writes k a program."""
    fixed = constants(size)
    tiles = triton.cdiv(size, fixed["COLUMNS"])
    groups = triton.cdiv(len(x), fixed["PERIOD"] * fixed["ROWS"])
    programs = max(1, min(programs_on(x.device) // tiles, groups))
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    squares = torch.empty(programs, tiles, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _fold_kernel[(programs, tiles)](
            x,
            sign_table(fixed["LENGTH"], torch.int8, x.device),
            partial,
            squares,
            len(x),
            key_of(seed),
            **fixed,
            num_warps=WARPS,
            **OPTIONS,
        )
    return partial.sum(0), squares.sum()


def constants(size: int) -> dict[str, int]:
    """Return what the kernel is compiled for."""
    columns = min(triton.next_power_of_2(size), _TILE // 2)
    shape = {"ROWS": _TILE // columns, "COLUMNS": columns}
    return {"SIZE": size, "PERIOD": period_of(size), "LENGTH": block_length(size), **shape}


@triton.jit(do_not_specialize=["key"])
def _fold_kernel(
    x, table, partial, squares, count, key,
    SIZE: tl.constexpr, PERIOD: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum a tile of columns over every programs-th group of rows."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    square = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    for first in range(tl.program_id(0) * ROWS, tl.cdiv(count, PERIOD), tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        hashed = _mix((row // (LENGTH // PERIOD) ^ key).to(tl.uint32))  # of the row's block: none per element
        shift = ((hashed >> 1) % (3 * LENGTH)).to(tl.int32) + row % (LENGTH // PERIOD) * PERIOD
        start = row.to(tl.int64) * PERIOD
        inside = column < tl.minimum(count - start, PERIOD).to(tl.int32)
        numbers = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        sign = tl.load(table + shift + column, mask=inside, other=1)
        total += tl.where(sign == 1 - 2 * (hashed & 1).to(tl.int8), numbers, -numbers)
        square += numbers.to(tl.float64) * numbers.to(tl.float64)  # float32 holds no squares of 1e-30 or 1e30
    at = tl.program_id(0) * SIZE + column
    tl.store(partial + at, tl.sum(total, axis=0)[None, :], mask=column < SIZE)
    tl.store(squares + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(square))


@triton.jit
def _mix(x):
    """Return `mix` of sketch.py of numbers of type uint32, whose products wrap."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
