"""Is the average that of the gradients? A sketch is linear, so the ballots know the sketch of what must come back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gaf_ddp.kernels.fold import Spans, fold
from gaf_ddp.runtime.hosts import machine

_ROUNDING = 4.0  # roundings of the sum's dtype for each doubling of the ranks; at most 0.8 were seen


class SumCheck:
    """Folds the averages of one ballot's steps, and compares them with the average of the ballots' sketches.

    Whatever broke between a rank's fold and the average shows: a network card, sums in the network, memory, a rank
    that votes with one gradient and sends another. Costs a fold of every bucket in the steps that are checked.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._sketches: list[Tensor] = []
        self._roundings = 0.0

    def add(self, average: Tensor, spans: Spans, dtype: torch.dtype) -> None:
        """Fold a bucket's average `(N,)`, which was added up in this dtype."""
        self._sketches.append(fold(average, spans, self._size)[0])
        self._roundings = max(self._roundings, torch.finfo(dtype).eps)

    def expect(self, sketches: Tensor, kept: Tensor) -> None:
        """Remember what the average must be, of all ranks' sketches `(W, k)` and who counted, bool `(W,)`."""
        share = (kept.double() / kept.sum().clamp(min=1)).to(sketches.device, non_blocking=True)
        self._expected = share @ torch.where(share[:, None] != 0, sketches, 0).double()

    def off(self, lengths: Sequence[float]) -> Tensor:
        """Return how far the average is from what it must be, `()` float64 on the device, in tolerances.

        Args:
            lengths: norms of the gradients of the ranks that counted.
        """
        found = torch.stack(self._sketches).double().sum(0)
        length = math.fsum(lengths) / len(lengths)
        tolerance = _ROUNDING * self._roundings * max(1.0, math.log2(len(lengths))) + 1e-6
        distance: Tensor = torch.linalg.vector_norm(found - self._expected)
        return distance / (length * tolerance)


def require_sums(off: Sequence[float], hosts: Sequence[str]) -> None:
    """Raise RuntimeError if a sum was off by more than its tolerance, or not finite, on some ranks."""
    wrong = [rank for rank, each in enumerate(off) if not each <= 1]
    if wrong:
        named = ", ".join(f"{rank} ({machine(hosts[rank])}): {off[rank]:.1e}" for rank in wrong[:8])
        raise RuntimeError(
            "check_every: the average must be that of the gradients that ranks voted with, found another on "
            f"ranks {named} times as far off as rounding explains: is a device, a network card or memory broken?"
        )
