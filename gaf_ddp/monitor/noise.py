"""The gradient noise scale (McCandlish et al., arXiv 1812.06162): over how many batches averaging still pays."""

import math
from collections.abc import Sequence

from torch import Tensor

from gaf_ddp.monitor.saved import require_numbers
from gaf_ddp.monitor.totals import Sums
from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.rules.memory import MOMENTUM

_NAMES = ("noise", "signal")


class NoiseScale:
    """B = tr Σ / |G|², of the gradients that count, in batches of one rank.

    With n gradients g_i of as large batches, the mean of ⟨g_i, g_j⟩ over pairs is |G|² in expectation, and the mean of
    |g_i|² is |G|² + tr Σ. Both are averaged over steps, each decayed by 0.99 per step, and then divided: the mean of
    quotients would be biased. Memory: two numbers.
    """

    def __init__(self) -> None:
        self._noise, self._signal, self._last = 0.0, 0.0, 0

    def add(self, step: int, decisions: Sequence[Agreement], voter_of: Tensor | None = None, steps: int = 1) -> None:
        """Add a step's decisions, on the host.

        Args:
            step: which one it is.
            decisions: one, or one a bucket; of the whole gradient's parts then.
            voter_of: `(W,)`, the voter of each rank, where a voter is several ranks, which have one gradient.
            steps: how many steps' gradients were added up.
        """
        decay = MOMENTUM ** max(step - self._last, 0)
        self._noise, self._signal, self._last = decay * self._noise, decay * self._signal, step
        for each in decisions:
            counted = (each.kept & each.voters & ~each.overlong).nonzero().flatten()
            ranks = 1.0
            if voter_of is not None:
                ranks = len(voter_of) / (int(voter_of.max()) + 1)
                seen = voter_of[counted].tolist()
                counted = counted[[seen.index(voter) for voter in dict.fromkeys(seen)]]
            count = len(counted)
            if count < 2:
                continue
            inner = each.gramian.index_select(0, counted).index_select(1, counted).double()
            length = float(inner.diagonal().mean())
            common = (float(inner.sum()) - count * length) / (count * (count - 1))
            if math.isfinite(length) and math.isfinite(common):
                self._noise += ranks * (length - common) / steps
                self._signal += common / steps**2

    @property
    def value(self) -> float:
        """The noise scale; NaN before it is known, and where no common gradient can be seen."""
        return self._noise / self._signal if self._signal > 0 and self._noise > 0 else math.nan

    def read(self) -> Sums:
        """Return it as plain numbers."""
        return {"noise": [self._noise], "signal": [self._signal], "last": [float(self._last)]}

    def load(self, state: object) -> None:
        """Restore what `read` returned; ValueError if it is something else, nothing is changed then."""
        require_numbers("noise", state, (*_NAMES, "last"), ())
        assert isinstance(state, dict)
        ((self._noise,), (self._signal,), (last,)) = (state[name] for name in (*_NAMES, "last"))
        self._last = int(last)
