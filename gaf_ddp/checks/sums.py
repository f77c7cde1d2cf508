"""Is the average that of the gradients? A sketch is linear, so the ballots know the sketch of what must come back."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gaf_ddp.kernels.fold import Spans, fold
from gaf_ddp.runtime.device import to_device
from gaf_ddp.runtime.hosts import machine

# Roundings of the sum's dtype for each doubling of the ranks: more than equal numbers' in a ring of up to 64, which
# all round the same way. Of random numbers less than 0.1 were seen.
_ROUNDING = 4.0
_FOLDING = 1e-6, 4e-10  # of a sketch in float32, and for the root of its elements; an eighth of it was seen
_PART = 0.7  # of the largest part in what is missing: whoever has as much is named too

GUARDED = -1.0  # instead of how far a sum was off: a rank that counted was shortened, or left out of some steps


class SumCheck:
    """Folds the averages of one ballot's steps, and compares them with the average of the ballots' sketches.

    Whatever broke between a rank's fold and the average shows: a network card, sums in the network, memory, a rank
    that votes with one gradient and sends another. Costs a fold of every bucket in the steps that are checked.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._averages: list[Tensor] = []  # their sketches
        self._elements = 0
        self._rounding, self._least = 0.0, 0.0  # of the coarsest dtype on the way, for large and for tiny numbers
        self._is_guarded: Tensor | None = None

    def add(self, average: Tensor, spans: Spans, dtype: torch.dtype) -> None:
        """Fold a bucket's average `(N,)`, which was added up in this dtype."""
        self._averages.append(fold(average, spans, self._size)[0])
        self._elements += len(average)
        for each in map(torch.finfo, (dtype, average.dtype)):
            self._rounding = max(self._rounding, each.eps)
            # Accelerators may take smaller numbers of float32 for zeros.
            self._least = max(self._least, each.tiny * each.eps, torch.finfo(torch.float32).tiny)

    def guard(self, squares: Sequence[Tensor], limits: Sequence[Tensor]) -> None:
        """Look whether this rank, which counts, was shortened in a step, or left out of some of a bucket's.

        Args:
            squares: of each bucket, its squared norms in the ballot's steps, float64.
            limits: of each bucket, its longest norm `()` float64.
        """
        found = []
        for square, limit in zip(squares, limits, strict=True):
            zero = square == 0
            found += [(square.sqrt() > limit).any(), zero.any() & ~zero.all()]
        self._is_guarded = torch.stack(found).any()

    def expect(self, sketches: Tensor, kept: Tensor) -> None:
        """Remember what the average must be, of all ranks' sketches `(W, k)` and who counted, bool `(W,)`."""
        share = to_device(kept.double() / kept.sum().clamp(min=1), sketches.device)
        self._sketches = sketches
        self._expected = share @ torch.where(share[:, None] != 0, sketches, 0).double()

    def off(self, lengths: Sequence[float]) -> Tensor:
        """Return how far the average is from what it must be, `()` float64 on the device, in tolerances.

        Args:
            lengths: norms of the gradients of the ranks that counted.

        Returns:
            `GUARDED` where this rank knows why it may be another.
        """
        count, length = len(lengths), math.fsum(lengths) / len(lengths)
        root = math.sqrt(self._elements)
        tolerance = _ROUNDING * self._rounding * max(1.0, math.log2(count)) + _FOLDING[0] + _FOLDING[1] * root
        allowed = length * tolerance + _ROUNDING * math.sqrt(count) * self._least * root
        missing = self._missing()
        off: Tensor = torch.linalg.vector_norm(missing) / max(allowed, torch.finfo(torch.float64).tiny)
        if self._rounding == torch.finfo(torch.float16).eps:  # sums may be beyond what it holds, and say so
            off = torch.where(missing.isfinite().all(), off, GUARDED)
        knows = ~self._expected.isfinite().all()
        if self._is_guarded is not None:
            knows = knows | self._is_guarded
        return torch.where(knows, GUARDED, off)

    def suspects(self) -> list[int]:
        """Return whose gradients the average lacks, or has too much of, at host syncs; the same on every rank.

        What is missing is a sum of the ranks' sketches as near as can be. Of those with the largest parts in it,
        ranks whose gradient is too much come behind those whose gradient is lacking: these sent another's.
        """
        missing, sketches = self._missing().cpu(), self._sketches.double().cpu()
        sketches = torch.where(sketches.isfinite().all(1, keepdim=True), sketches, 0)
        lengths = torch.linalg.vector_norm(sketches, dim=1)
        if not bool(missing.isfinite().all()) or not bool(lengths.any()):
            return []
        units = sketches / lengths.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        parts = torch.linalg.pinv(units @ units.mT, hermitian=True, rtol=1e-6) @ (units @ missing)
        large = parts.abs() >= _PART * parts.abs().max()
        lacking = large & (parts > 0)
        found: list[int] = (lacking if bool(lacking.any()) else large).nonzero().flatten().tolist()
        return found

    def _missing(self) -> Tensor:
        return self._expected - torch.stack(self._averages).double().sum(0)


def require_sums(off: Sequence[float], hosts: Sequence[str], suspects: Callable[[], Sequence[int]]) -> None:
    """Raise RuntimeError if a sum was off by more than its tolerance, or not finite, on some ranks.

    Args:
        off: of each rank, what `SumCheck.off` returned there; 0 where nothing was checked.
        hosts: of the ranks.
        suspects: `SumCheck.suspects` of what was checked, asked for where most ranks' sums are wrong.
    """
    wrong = [rank for rank, each in enumerate(off) if not each <= 1]
    if not wrong or GUARDED in off:
        return
    names = [f"{rank} ({machine(hosts[rank])})" for rank in range(len(off))]
    found = ", ".join(f"{names[rank]}: {off[rank]:.1e}" for rank in wrong[:8]) + ", …" * (len(wrong) > 8)
    words = f"found another on ranks {found} times as far off as rounding explains"
    lacking = suspects() if 2 * len(wrong) > len(off) else []
    if lacking:
        words += f", as if rank{'s' * (len(lacking) > 1)} {', '.join(names[rank] for rank in lacking[:8])} had sent"
        words += " another gradient, or had been left out"
    rule = "check_every: the average must be that of the gradients that ranks voted with"
    raise RuntimeError(f"{rule}, {words}: is a device, a network card or memory broken?")
