"""The filtering core in Triton, for accelerators: rows are read once, decisions never leave the device.

Each function equals the plain-torch one of the same name (gramian.py, agreement.py), which stays the reference.
Sums are deterministic: no atomics, partial sums in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_GRAM = 64  # ranks; above, a slice is so short that torch's own product is no bottleneck
_LARGEST_DECISION = 1024  # ranks


def can_gram(rows: Tensor) -> bool:
    """Return whether `gram` takes these rows."""
    return rows.dtype in (torch.float32, torch.bfloat16, torch.float16) and 2 <= len(rows) <= _LARGEST_GRAM


def can_combine(rows: Tensor, out: Tensor) -> bool:
    """Return whether `combine` takes these rows."""
    wanted = (torch.float32, torch.bfloat16, torch.float16)
    return rows.dtype in wanted and out.dtype in wanted and out.is_contiguous()


def can_decide(gramian: Tensor) -> bool:
    """Return whether `neighborhood` takes this Gramian."""
    return gramian.dtype == torch.float32 and 2 <= len(gramian) <= _LARGEST_DECISION


def gram(rows: Tensor) -> Tensor:
    """Return the Gramian `(W, W)` float32 of rows `(W, n)`; reads `W n` elements, writes W² per program."""
    count, columns = rows.shape
    rows = rows.contiguous()
    padded = max(triton.next_power_of_2(count), 2)
    # Few float32 rows: products and sums in registers, since tensor cores would round them to TF32.
    in_registers = rows.dtype == torch.float32 and padded <= 16
    padded = padded if in_registers else max(padded, 16)
    block = 8192 // (padded * padded) if in_registers else (128 if rows.dtype == torch.float32 else 256)
    programs = max(1, min(triton.cdiv(columns, block), _programs(rows.device)))
    partial = torch.empty(programs, count, count, dtype=torch.float32, device=rows.device)
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
    )
    return partial.sum(0, dtype=torch.float64).float()


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write `weights @ rows` into out `(n,)`; rows of weight 0 are neither read nor multiplied."""
    count, columns = rows.shape
    block = 2048
    if columns:
        _combine_kernel[(triton.cdiv(columns, block),)](
            rows.contiguous(), weights.float(), out, columns, COUNT=count, BLOCK=block, num_warps=8
        )
    return out


def neighborhood(gramian: Tensor, tau: float, max_norm_ratio: float | None) -> tuple[Tensor, ...]:
    """Judge a Gramian `(W, W)` by NeighborhoodAgreement(tau) behind the voter's guards, in one launch.

    Returns the fields of `Agreement` after the Gramian, in their order. tau is rounded to float32, as the
    Gramian is.
    """
    count, device = len(gramian), gramian.device
    padded = triton.next_power_of_2(count)
    cosine = torch.empty(count, count, dtype=torch.float64, device=device)
    weights = torch.empty(count, dtype=torch.float32, device=device)
    kept, voters, nonfinite, overlong = torch.empty(4, count, dtype=torch.bool, device=device)
    agreed = torch.empty((), dtype=torch.bool, device=device)
    ratio = float("inf") if max_norm_ratio is None else max_norm_ratio
    _neighborhood_kernel[(1,)](
        gramian.contiguous(), cosine, weights, kept, agreed, voters, nonfinite, overlong, tau, ratio,
        COUNT=count, PADDED=padded, TILE=min(padded, max(1, 8192 // padded)), num_warps=4 if padded <= 64 else 8,
    )  # fmt: skip
    return cosine, weights, kept, agreed, voters, nonfinite, overlong


def _programs(device: torch.device) -> int:
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


@triton.jit
def _neighborhood_kernel(
    gramian, cosine, weights, keeps, agreed, votes, nonfinites, overlongs, tau, ratio,
    COUNT: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the voters, then the centre, tile of rows by tile of rows; then write what it says of each rank."""
    j = tl.arange(0, PADDED)
    exists = j < COUNT
    square = tl.load(gramian + j * COUNT + j, mask=exists, other=0.0).to(tl.float64)
    finite = (square - square) == 0.0  # NaN and inf are not
    candidate = exists & finite & (square > 0.0)
    norm = tl.sqrt(tl.where(candidate, square, 0.0))
    median = _lower_median(norm, candidate, PADDED)
    overlong = candidate & (norm > ratio * median)
    voter = candidate & ~overlong
    voters = tl.sum(voter.to(tl.int32), axis=0)

    best_count = -1
    best_spread = tl.sum(norm, axis=0) * 0.0  # a float64 0
    centre = 0
    for first in range(0, COUNT, TILE):
        i = first + tl.arange(0, TILE)
        distance, near = _near_rows(gramian, cosine, i, j, square, voter, tau, COUNT, TILE, PADDED)
        count = tl.sum(near.to(tl.int32), axis=1)
        spread = tl.sum(tl.where(near, distance, 0.0), axis=1)
        most = tl.max(count, axis=0)
        least = tl.min(tl.where(count == most, spread, float("inf")), axis=0)
        lowest = tl.min(tl.where((count == most) & (spread == least), i, PADDED), axis=0)
        better = (most > best_count) | ((most == best_count) & (least < best_spread))
        best_count = tl.where(better, most, best_count)
        best_spread = tl.where(better, least, best_spread)
        centre = tl.where(better, lowest, centre)

    at_centre = tl.load(gramian + centre * COUNT + j, mask=exists, other=0.0).to(tl.float64)
    length = tl.sqrt(square * tl.sum(tl.where(j == centre, square, 0.0), axis=0))
    similar = tl.where(voter & (length > 0.0), at_centre / tl.where(length > 0.0, length, 1.0), 0.0)
    similar = tl.minimum(tl.maximum(similar, -1.0), 1.0)
    kept = voter & ((1.0 - similar <= tau) | (j == centre)) & ((best_count >= 2) | (voters < 2))
    number = tl.sum(kept.to(tl.int32), axis=0)
    nonfinite = exists & ~finite
    poisoned = (tl.sum(nonfinite.to(tl.int32), axis=0) > 0) & (voters == 0)
    share = tl.where(kept, 1.0 / tl.maximum(number, 1).to(tl.float32), 0.0)
    tl.store(weights + j, tl.where(poisoned, float("nan"), share), mask=exists)
    tl.store(keeps + j, kept, mask=exists)
    tl.store(votes + j, voter, mask=exists)
    tl.store(nonfinites + j, nonfinite, mask=exists)
    tl.store(overlongs + j, overlong, mask=exists)
    tl.store(agreed, (number > 0) | ((voters == 0) & ~poisoned))


@triton.jit
def _near_rows(
    gramian, cosine, i, j, square, voter, tau,
    COUNT: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return the distances `(TILE, PADDED)` and which pairs of voters are near; write the cosines."""
    inside = (i < COUNT)[:, None] & (j < COUNT)[None, :]
    inner = tl.load(gramian + i[:, None] * COUNT + j[None, :], mask=inside, other=0.0).to(tl.float64)
    mine = i[:, None] == j[None, :]
    square_i = tl.sum(tl.where(mine, square[None, :], 0.0), axis=1)
    voter_i = tl.sum((mine & voter[None, :]).to(tl.int32), axis=1) > 0
    both = voter_i[:, None] & voter[None, :]
    length = tl.sqrt(tl.where(both, square_i[:, None] * square[None, :], 0.0))
    similar = tl.where(length > 0.0, inner / tl.where(length > 0.0, length, 1.0), 0.0)
    similar = tl.minimum(tl.maximum(similar, -1.0), 1.0)
    tl.store(cosine + i[:, None] * COUNT + j[None, :], similar, mask=inside)
    distance = 1.0 - similar
    return distance, both & ((distance <= tau) | mine)


@triton.jit
def _lower_median(norm, candidate, PADDED: tl.constexpr):
    """Return the lower median of the candidates' norms; 0 without candidates."""
    ordered = tl.sort(tl.where(candidate, norm, float("inf")))
    middle = tl.maximum(tl.sum(candidate.to(tl.int32), axis=0) - 1, 0) // 2
    return tl.sum(tl.where(tl.arange(0, PADDED) == middle, ordered, 0.0), axis=0)
