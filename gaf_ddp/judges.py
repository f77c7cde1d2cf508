"""What ranks are judged by: their present gradients, or momenta of them; consensus_judge.py has a third.

A judge measures rows, one bucket at a time, in matrices that add up over slices, buckets and ranks; when they have
been added up it decides. All ranks hold the same matrices then, and decide alike.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from torch import Tensor

from gaf_ddp.agreement import Agreement, decide
from gaf_ddp.gramian import Rows, gram
from gaf_ddp.momenta import Momenta, judged

Rule = Callable[[Tensor], Tensor]


class Judge(Protocol):
    """Measure buckets as they arrive, decide on some of them at a time, and end the step."""

    def measure(self, key: Hashable, rows: Rows) -> Tensor:
        """Return what adds up `(r, W)`, float64, for the rows `(W, n)` of the bucket called key."""
        ...

    def decide(
        self, keys: Sequence[Hashable], measured: Tensor, rule: Rule, max_norm_ratio: float | None
    ) -> Agreement:
        """Decide on these buckets, given the sum of what was measured on them."""
        ...

    def finish(self) -> None:
        """End a step."""
        ...


class ByGradients:
    """Judge ranks by their present gradients alone."""

    def measure(self, key: Hashable, rows: Rows) -> Tensor:
        """Return the Gramian `(W, W)`."""
        return gram(rows)

    def decide(
        self, keys: Sequence[Hashable], measured: Tensor, rule: Rule, max_norm_ratio: float | None
    ) -> Agreement:
        """Decide by the Gramian."""
        return decide(measured, rule, max_norm_ratio)

    def finish(self) -> None:
        """Remember nothing."""


class ByMomenta:
    """Judge ranks by momenta of their gradients, by any rule."""

    def __init__(self, decay: float) -> None:
        self._momenta = Momenta(decay)

    def measure(self, key: Hashable, rows: Rows) -> Tensor:
        """Return the Gramian of the momenta, and who has a gradient: `(W + 1, W)`."""
        return self._momenta.measure(key, rows)

    def decide(
        self, keys: Sequence[Hashable], measured: Tensor, rule: Rule, max_norm_ratio: float | None
    ) -> Agreement:
        """Decide by the momenta's Gramian; the momenta of ranks that are not finite or too long begin anew."""
        agreement = decide(judged(measured), rule, max_norm_ratio)
        for key in keys:
            self._momenta.forget(key, agreement.nonfinite | agreement.overlong)
        return agreement

    def finish(self) -> None:
        """Forget the buckets that this step did not have."""
        self._momenta.finish()
