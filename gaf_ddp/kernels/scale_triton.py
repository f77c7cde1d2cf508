"""The scaling of gradients in Triton, for accelerators: one launch each, no host sync. Its reference is scale.py.

All scalars are read where they lie, on the device, so that nothing depends on what the host knows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gaf_ddp.kernels.gram_triton import OPTIONS, programs_on
from gaf_ddp.kernels.scale import EXACT

WARPS, BLOCK = 8, 4096  # of a program, and elements that it has in registers
APART_BLOCK = 2048  # the same, of one that writes elsewhere: its second pointers take registers too
_INF = tl.constexpr(float("inf"))


def can_scale(gradient: Tensor) -> bool:
    """Return whether `scale` and `correct` take this vector."""
    return gradient.dtype in (torch.float32, torch.bfloat16, torch.float16) and gradient.is_contiguous()


def scale(gradient: Tensor, square: Tensor, count: Tensor, limit: Tensor, out: Tensor | None = None) -> Tensor:
    """Scale gradient `(N,)` by the scalars `()` float64, in place or into out, and return the share; one launch.

    Where nothing is shortened, an element becomes its product with float32's 1/count, in float32 and rounded once:
    what `div_(count)` by a Python number gives on CUDA. In place a gradient that stays as it is is neither read nor
    written. One that becomes zeros is not read. The share is `(2,)` float64.
    """
    share = torch.empty(2, dtype=torch.float64, device=gradient.device)
    with torch.cuda.device_of(gradient):  # Triton launches on the current device
        _scale_kernel[(_programs(gradient),)](
            gradient, square, count, limit, share, gradient if out is None else out, len(gradient),
            IN_PLACE=out is None, BLOCK=BLOCK if out is None else APART_BLOCK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return share


def correct(total: Tensor, shares: Tensor) -> Tensor:
    """Divide total `(N,)` by the first of shares `(2,)` float64 in place; one launch, mostly of no work."""
    with torch.cuda.device_of(total):
        _correct_kernel[(_programs(total),)](
            total, shares.contiguous(), len(total), EXACT=EXACT, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS
        )
    return total


def _programs(x: Tensor) -> int:
    """Return how many programs share x: each works out the factor in float64, slow on many GPUs, so but few."""
    blocks: int = triton.cdiv(len(x), BLOCK)
    return max(1, min(blocks, programs_on(x.device)))


# One program for buckets of any size, and for scalars that lie anywhere: none is compiled in the middle of training.
@triton.jit(do_not_specialize=["square", "count", "limit", "share", "numbers"])
def _scale_kernel(
    gradient, square, count, limit, share, out, numbers: tl.int64, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Multiply every programs-th block; the first program writes the share."""
    norm, ranks, longest = tl.sqrt(tl.load(square)), tl.load(count), tl.load(limit)
    finite = norm < _INF  # NaN is not less than anything
    counts = finite & (norm > 0.0) & (ranks > 0.0)
    own = tl.where(counts, 1.0 / tl.where(counts, ranks, 1.0), 0.0)
    factor = tl.where(counts & (norm > longest), own * (longest / norm), own).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(share, own)
        tl.store(share + 1, tl.where(finite, 0.0, 1.0))
    if (not IN_PLACE) or factor != 1.0:
        to = gradient if IN_PLACE else out
        for block in range(tl.program_id(0), numbers // BLOCK, tl.num_programs(0)):
            _multiply(gradient, to, factor, block * BLOCK, numbers, WHOLE=True, BLOCK=BLOCK)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            _multiply(gradient, to, factor, numbers // BLOCK * BLOCK, numbers, WHOLE=False, BLOCK=BLOCK)


@triton.jit
def _multiply(x, to, factor, first, numbers, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply a block of x; a whole one has no bounds, which would keep it from being read in vectors."""
    at = first + tl.arange(0, BLOCK).to(tl.int64)
    inside = tl.full((BLOCK,), 1, tl.int1) if WHOLE else at < numbers
    # Zeros are written without a look at what was there: NaN times 0 is NaN.
    wanted = inside & (tl.full((BLOCK,), 0.0, tl.float32) != factor)
    own = tl.load(x + at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(to + at, (own * factor).to(to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["shares", "numbers"])
def _correct_kernel(total, shares, numbers: tl.int64, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Divide every programs-th block, or fill it with NaN, or leave it alone."""
    counted, broken = tl.load(shares), tl.load(shares + 1)
    nobody = counted <= EXACT
    as_expected = tl.abs(counted - 1.0) <= EXACT
    if (nobody & (broken > 0.0)) | ~(nobody | as_expected):
        divisor = tl.where(nobody, float("nan"), counted).to(tl.float32)
        for block in range(tl.program_id(0), numbers // BLOCK, tl.num_programs(0)):
            _divide(total, divisor, block * BLOCK, numbers, WHOLE=True, BLOCK=BLOCK)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            _divide(total, divisor, numbers // BLOCK * BLOCK, numbers, WHOLE=False, BLOCK=BLOCK)


@triton.jit
def _divide(x, divisor, first, numbers, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Divide a block of x, as `_multiply` does."""
    at = first + tl.arange(0, BLOCK).to(tl.int64)
    inside = tl.full((BLOCK,), 1, tl.int1) if WHOLE else at < numbers
    own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, tl.div_rn(own, divisor).to(x.dtype.element_ty), mask=inside)
