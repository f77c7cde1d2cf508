"""What a rank does to its own gradient before it is added up, and to the sum behind it.

A rank that counts divides its gradient by the number of ranks that count, as torch's `allreduce_hook` does, and
shortens it where it is longer than the limit. One that is left out, or whose gradient is not finite or zero, adds
zeros. Beside the sum of the gradients goes that of the shares (2,): what ranks really counted, which is 1 where
all went as expected, and whose gradients were not finite. All ranks see the same sums, and correct by them.
"""

import math

import torch
from torch import Tensor

from gaf_ddp.runtime.device import kernels, on_host

EXACT = 1e-6  # shares of up to 500,000 ranks add up to 1 as near as this, or one of them is missing


def scale(gradient: Tensor, square: Tensor, count: Tensor, limit: Tensor, out: Tensor | None = None) -> Tensor:
    """Scale a rank's gradient by its share, in place or into `out`.

    Args:
        gradient: `(N,)` floating point, any device; overwritten where there is no `out`.
        square: `()` float64, its squared norm, finite exactly where the gradient is.
        count: `()` float64, how many ranks count, this one with them; 0 where this rank is left out.
        limit: `()` float64, the longest norm; longer gradients are shortened to it.
        out: `(N,)` of the gradient's dtype, where the result goes; the gradient stays as it is then.

    Returns:
        The share `(2,)` float64: 1/count or 0, and 1 where the gradient is not finite.

    On an accelerator nothing waits for the device: one launch with Triton, some ten without.
    """
    fused = kernels(gradient.device.type, "scale_triton")
    if fused is not None and fused.can_scale(gradient):
        scaled: Tensor = fused.scale(gradient, square, count, limit, out)
        return scaled
    return (_scale_on_host if on_host(gradient) else _scale_on_accelerator)(gradient, square, count, limit, out)


def _scale_on_host(gradient: Tensor, square: Tensor, count: Tensor, limit: Tensor, out: Tensor | None = None) -> Tensor:
    norm, ranks, longest = math.sqrt(square.item()), count.item(), limit.item()
    share = 1 / ranks if ranks and 0 < norm < math.inf else 0.0
    result = gradient if out is None else out
    if not share:
        result.zero_()
    elif norm > longest:
        torch.mul(gradient, share * (longest / norm), out=result)  # in one pass; half precision is rounded once
    elif ranks != 1:
        torch.div(gradient, ranks, out=result)
    elif out is not None:
        out.copy_(gradient)
    return torch.tensor([share, not norm < math.inf], dtype=torch.float64)


def _scale_on_accelerator(
    gradient: Tensor, square: Tensor, count: Tensor, limit: Tensor, out: Tensor | None = None
) -> Tensor:
    norm = square.sqrt()
    share = torch.where((norm > 0) & norm.isfinite() & (count > 0), 1 / count, 0)
    factor = share * (limit / norm).clamp(max=1).nan_to_num(1.0)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    result = gradient if out is None else out
    result.copy_(torch.where(factor != 0, gradient.to(wide) * factor.to(wide), 0))
    return torch.stack([share, (~norm.isfinite()).double()])


def correct(total: Tensor, shares: Tensor) -> Tensor:
    """Divide the ranks' sum by what really counted, in place, where that is not 1.

    Where nobody counted the sum is zeros already; it becomes NaN where somebody's gradient was not finite, so that
    GradScaler backs off.

    Args:
        total: `(N,)`, the sum of the scaled gradients; overwritten.
        shares: `(2,)` float64, the sum of the shares.

    Returns:
        Total. On an accelerator nothing waits for the device: one launch with Triton, some five without.
    """
    fused = kernels(total.device.type, "scale_triton")
    if fused is not None and fused.can_scale(total):
        corrected: Tensor = fused.correct(total, shares)
        return corrected
    if not on_host(total):
        counted, broken = shares.unbind()
        divisor = torch.where((counted - 1).abs() > EXACT, counted, 1)
        divisor = torch.where(counted > EXACT, divisor, torch.where(broken > 0, torch.nan, 1))
        wide = torch.promote_types(total.dtype, torch.float32)  # else half precision would round the divisor too
        return torch.div(total.to(wide), divisor.to(wide), out=total)
    counted, broken = shares.tolist()
    if counted <= EXACT:
        return total.fill_(math.nan) if broken else total
    return total if abs(counted - 1) <= EXACT else total.div_(counted)
