"""The filtering core in Triton, for accelerators: rows are read once. Decisions are in _triton_decision.py.

Each function equals the plain-torch one of the same name in gramian.py, which stays the reference. Sums are
deterministic: no atomics, partial sums in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # Triton warns where it is left to a default that will change
_LARGEST_GRAM = 64  # ranks; above, a slice is so short that torch's own product is no bottleneck


def can_gram(rows: Tensor) -> bool:
    """Return whether `gram` takes these rows."""
    return rows.dtype in (torch.float32, torch.bfloat16, torch.float16) and 2 <= len(rows) <= _LARGEST_GRAM


def can_combine(rows: Tensor, out: Tensor) -> bool:
    """Return whether `combine` takes these rows."""
    wanted = (torch.float32, torch.bfloat16, torch.float16)
    return rows.dtype in wanted and out.dtype in wanted and out.is_contiguous()


def gram(rows: Tensor) -> Tensor:
    """Return the Gramian `(W, W)` float32 of rows `(W, n)`; reads `W n` elements, writes W² per program."""
    count, columns = rows.shape
    rows = rows.contiguous()
    padded = max(triton.next_power_of_2(count), 2)
    # Few float32 rows: products and sums in registers, since tensor cores would round them to TF32.
    in_registers = rows.dtype == torch.float32 and padded <= 16
    padded = padded if in_registers else max(padded, 16)
    block = 8192 // (padded * padded) if in_registers else (128 if rows.dtype == torch.float32 else 256)
    programs = max(1, min(triton.cdiv(columns, block), programs_on(rows.device)))
    partial = torch.empty(programs, count, count, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _gram_kernel[(programs,)](
            rows,
            partial,
            columns,
            COUNT=count,
            PADDED=padded,
            BLOCK=block,
            IN_REGISTERS=in_registers,
            # TF32 holds every float16 and bfloat16 exactly; three TF32 products make a float32 one.
            PRECISION="tf32x3" if rows.dtype == torch.float32 else "tf32",
            num_warps=4,
            **OPTIONS,
        )
    return partial.sum(0, dtype=torch.float64).float()


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write `weights @ rows` into out `(n,)`; rows of weight 0 are neither read nor multiplied."""
    count, columns = rows.shape
    block = 2048
    if columns:
        with torch.cuda.device_of(rows):
            _combine_kernel[(triton.cdiv(columns, block),)](
                rows.contiguous(), weights.float(), out, columns, COUNT=count, BLOCK=block, num_warps=8, **OPTIONS
            )
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


@triton.jit
def _gram_kernel(
    rows, partial, columns,
    COUNT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the products over every programs-th block of columns."""
    program = tl.program_id(0)
    step = tl.num_programs(0) * BLOCK
    i = tl.arange(0, PADDED)
    start = i.to(tl.int64)[:, None] * columns
    if IN_REGISTERS:
        products = tl.zeros((PADDED, PADDED, BLOCK), dtype=tl.float32)
    else:
        total = tl.zeros((PADDED, PADDED), dtype=tl.float32)
    for first in range(program * BLOCK, columns, step):
        column = first + tl.arange(0, BLOCK)
        inside = (i < COUNT)[:, None] & (column < columns)[None, :]
        x = tl.load(rows + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if IN_REGISTERS:
            products += x[:, None, :] * x[None, :, :]
        else:
            total = tl.dot(x, tl.trans(x), total, input_precision=PRECISION)
    if IN_REGISTERS:
        total = tl.sum(products, axis=2)
    at = partial + program * COUNT * COUNT + i[:, None] * COUNT + i[None, :]
    tl.store(at, total, mask=(i < COUNT)[:, None] & (i < COUNT)[None, :])


@triton.jit
def _combine_kernel(rows, weights, out, columns, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum one block of columns over the rows; the mask keeps a left-out row from being loaded."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(COUNT):
        weight = tl.load(weights + i)
        counts = inside & (tl.full((BLOCK,), 0.0, tl.float32) != weight)
        x = tl.load(rows + column, mask=counts, other=0.0).to(tl.float32)
        total += tl.where(counts, weight * x, 0.0)
        rows += columns
    tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)
