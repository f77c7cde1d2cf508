"""The filtering core in Triton, for accelerators: rows are read once. Decisions are in decide_triton.py.

Each function equals the plain-torch one of the same name in gram.py, which stays the reference. Sums are
deterministic: no atomics, partial sums in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True, "num_stages": 5}  # Triton warns where fusion is left to its default
_LARGEST_GRAM = 64  # ranks; above, a slice is so short that torch's own product is no bottleneck
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_gram(rows: Tensor) -> bool:
    """Return whether `gram` takes these rows."""
    return rows.dtype in _DTYPES and 2 <= len(rows) <= _LARGEST_GRAM


def can_combine(rows: Tensor, out: Tensor) -> bool:
    """Return whether `combine` takes these rows."""
    return rows.dtype in _DTYPES and out.dtype in _DTYPES and out.is_contiguous()


def gram(rows: Tensor) -> Tensor:
    """Return the Gramian `(W, W)` float64 of rows `(W, n)`; reads `W n` elements, writes W² per program.

    Where float32 cannot hold the square of a row, a program reads all rows once more for it.
    """
    count, columns = rows.shape
    fixed, warps = constants(count, rows.dtype)
    # A warp alone is little work, and W² numbers for each program are much.
    most = programs_on(rows.device) * 32 // (fixed["PADDED"] * 2 if warps == 1 else max(fixed["PADDED"], 32))
    programs = max(1, min(triton.cdiv(columns, fixed["BLOCK"]), most))
    partial = torch.empty(programs, count, count, dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _gram_kernel[(programs,)](rows.contiguous(), partial, *_units(columns), **fixed, num_warps=warps, **OPTIONS)
    return partial.sum(0)


def constants(count: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Return what the kernel of `gram` is compiled for, and its warps: with larger blocks it spills."""
    single = dtype == torch.float32
    # Few ranks: a warp is a program and holds rows and sums in its registers. More: tensor cores.
    in_registers = count <= (8 if single else 4)
    padded, warps = triton.next_power_of_2(count if in_registers else max(count, 16)), 1 if in_registers else 4
    block = (1024 if in_registers or single else 4096) // padded
    shape = {"COUNT": count, "PADDED": padded, "BLOCK": block, "TILE": 128 * warps // padded}
    return {**shape, "IN_REGISTERS": in_registers}, warps


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write `weights @ rows` into out `(n,)`; rows of weight 0 are neither read nor multiplied."""
    count, columns = rows.shape
    block = 4096 // rows.element_size()  # with more, sm_80 spills
    if columns:
        with torch.cuda.device_of(rows):
            _combine_kernel[(triton.cdiv(columns, block),)](
                rows.contiguous(), weights.contiguous(), out, *_units(columns), COUNT=count, BLOCK=block,
                num_warps=8, **OPTIONS,
            )  # fmt: skip
    return out


def probe(device: torch.device) -> None:
    """Compile and launch one kernel; raise what Triton raises where it cannot, e.g. without a C compiler."""
    row = torch.ones(1, 1, device=device)
    combine(row, row[0], torch.empty_like(row[0]))


def programs_on(device: torch.device) -> int:
    """Return how many programs fill the device."""
    if device.type == "cpu":  # the interpreter
        return 3
    return 4 * int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


def _units(columns: int) -> tuple[int, int]:
    """Split columns into units and their size, so that the compiler sees what divides the distance of rows."""
    align = math.gcd(columns, 16) if columns < 2**31 else 1  # the product is an int32 as its factors are
    return columns // align, align


@triton.jit(do_not_specialize=["units"])
def _gram_kernel(
    rows, partial, units, ALIGN: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Sum the products over every programs-th block of columns."""
    columns = units * ALIGN
    begin = tl.program_id(0) * BLOCK
    step = tl.num_programs(0) * BLOCK
    i = tl.arange(0, PADDED)
    exists = i < COUNT
    if IN_REGISTERS:
        total = _in_registers(rows, columns, begin, step, i, COUNT, PADDED, BLOCK)
    else:
        total = tl.zeros((PADDED, PADDED), dtype=tl.float64)
        for first in range(begin, columns, step):
            x = _load(rows, i, first + tl.arange(0, BLOCK), columns, COUNT)
            # TF32 holds half precision exactly (Triton 3.6's interpreter takes bfloat16 for integers), three TF32
            # products make a float32 one. Tensor cores cut sums off, not round them: they add up one block only.
            if rows.dtype.element_ty == tl.float32:
                total += tl.dot(x, tl.trans(x), input_precision="tf32x3").to(tl.float64)
            else:
                wide = x.to(tl.float32)
                total += tl.dot(wide, tl.trans(wide), input_precision="tf32").to(tl.float64)
    square = tl.sum(tl.where(i[:, None] == i[None, :], total, 0.0), axis=1)
    least = tl.cdiv(columns - begin, step) * (BLOCK * 1e-32)  # below it terms may have lost digits
    lost = exists & ~((square >= least) & (square < float("inf")))
    partial += tl.program_id(0) * COUNT * COUNT
    tl.store(partial + i[:, None] * COUNT + i[None, :], total, mask=exists[:, None] & exists[None, :])
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        _again(rows, partial, columns, begin, step, i, lost, COUNT, PADDED, BLOCK, TILE)


@triton.jit
def _in_registers(rows, columns, begin, step, i, COUNT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sums of one warp: a vector for each row, an accumulator for each pair of rows."""
    sums = ()
    for _ in tl.static_range(COUNT * (COUNT + 1) // 2):
        sums += (tl.zeros((BLOCK,), dtype=tl.float32),)
    for first in range(begin, columns, step):
        column = first + tl.arange(0, BLOCK)
        x, added = (), ()
        for a in tl.static_range(COUNT):
            at = rows + a * columns.to(tl.int64) + column
            x += (tl.load(at, mask=column < columns, other=0.0).to(tl.float32),)
            for b in tl.static_range(a + 1):
                added += (sums[len(added)] + x[a] * x[b],)
        sums = added
    total = tl.zeros((PADDED, PADDED), dtype=tl.float64)
    for a in tl.static_range(COUNT):
        for b in tl.static_range(a + 1):
            here = (i[:, None] == a) & (i[None, :] == b) | (i[:, None] == b) & (i[None, :] == a)
            total = tl.where(here, tl.sum(sums[a * (a + 1) // 2 + b], axis=0).to(tl.float64), total)
    return total


@triton.jit
def _again(
    rows, partial, columns, begin, step, i, lost, COUNT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write what float32 lost once more, in float64, one row against all at a time: rare, no more registers."""
    for a in range(COUNT):
        some = tl.zeros((TILE,), dtype=tl.int32)
        if tl.max((lost & (i == a)).to(tl.int32), axis=0) > 0:
            for first in range(begin, columns, step):  # a row of zeros, as of unused parameters, has lost nothing
                for part in range(first, first + BLOCK, TILE):
                    column = part + tl.arange(0, TILE)
                    own = tl.load(rows + a * columns.to(tl.int64) + column, mask=column < columns, other=0.0)
                    some |= (own != 0.0).to(tl.int32)
        if tl.max(some, axis=0) > 0:
            sums = tl.zeros((PADDED, TILE), dtype=tl.float64)
            for first in range(begin, columns, step):
                for part in range(first, first + BLOCK, TILE):
                    column = part + tl.arange(0, TILE)
                    own = tl.load(rows + a * columns.to(tl.int64) + column, mask=column < columns, other=0.0)
                    x = _load(rows, i, column, columns, COUNT)
                    sums += x.to(tl.float64) * own.to(tl.float64)[None, :]
            tl.debug_barrier()  # after whatever another thread wrote there
            tl.store(partial + a * COUNT + i, tl.sum(sums, axis=1), mask=i < COUNT)
            tl.store(partial + i * COUNT + a, tl.sum(sums, axis=1), mask=i < COUNT)


@triton.jit
def _load(rows, i, column, columns, COUNT: tl.constexpr):
    """Return columns of all rows `(PADDED, len(column))`, zeros outside."""
    inside = (i < COUNT)[:, None] & (column < columns)[None, :]
    return tl.load(rows + i.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["units"])
def _combine_kernel(rows, weights, out, units, ALIGN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum one block of columns over the rows; the mask keeps a left-out row from being loaded."""
    columns = units * ALIGN
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(COUNT):
        weight = tl.load(weights + i).to(tl.float32)
        counts = inside & (tl.full((BLOCK,), 0.0, tl.float32) != weight)
        x = tl.load(rows + column, mask=counts, other=0.0).to(tl.float32)
        total += tl.where(counts, weight * x, 0.0)
        rows += columns
    tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)
