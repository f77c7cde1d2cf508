"""The consensus rule one step late without processes: what the hook does on W ranks, rank by rank.

Folds, shares, sums, judge and verdict are the package's own. One process has one bucket, the whole gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gaf_ddp import GAFState
from gaf_ddp.ballots.ballot import Numbers
from gaf_ddp.ballots.verdict import draw
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.kernels.scale import correct, scale
from gaf_ddp.rules.medians import upper_median


class OneStepLate:
    """All W ranks' part of the late way, and the verdict that they share.

    Args:
        state: holds settings and judge; a ballot for every step.
        world: W.
    """

    def __init__(self, state: GAFState, world: int) -> None:
        self._state, self._voters = state, Voters(list(range(world)))
        self._kept = torch.ones(world, dtype=torch.bool)
        self._limits: Tensor | None = None  # (W, 1)
        self._read: Tensor | None = None  # (W, 2, k), sketches of held-out data's gradients
        self._loss = self._loss_due = 0.0
        self._due: Tensor | None = None  # the same, that the next ballots carry

    def read(self, readings: Sequence[Tensor], loss: float) -> None:
        """Take the ranks' two gradients `(W, N)` of held-out data, for the ballot after the next one."""
        folded = [[fold(row, whole(len(row)), self._state.sketch_size)[0] for row in rows] for rows in readings]
        self._read, self._loss = torch.stack([torch.stack(each) for each in folded], 1), loss

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Average the gradients `(W, N)` by the last verdict, and draw the next one; the gradients are overwritten.

        Returns:
            The average `(N,)`, and who counts by the next verdict, bool `(W,)`: the record that the hook's state has
            after the step.
        """
        state = self._state
        assert state._judge is not None
        folded = [fold(row, whole(len(row)), state.sketch_size) for row in rows]
        sketches, squares = (torch.stack(each) for each in zip(*folded, strict=True))
        if self._limits is None:
            self._limits = self._limits_now(squares)
        counted = self._kept
        divisors = counted * counted.sum().double()
        parts = zip(rows, squares, divisors, self._limits[:, 0], strict=True)
        shares = [scale(row, square, divisor, limit) for row, square, divisor, limit in parts]
        average = correct(rows.sum(0), torch.stack(shares).sum(0))
        products = state._judge.tally(self._voters.mean(sketches), 1, self._due)
        self._due, self._read, self._loss_due = self._read, None, self._loss
        loss = torch.full((len(rows),), self._loss_due, dtype=torch.float64)
        none = torch.zeros(len(rows), 2, dtype=torch.float64)
        numbers = Numbers(squares[:, None], none[:, 0], none, none[:, 0], none[:, 0], loss, none, squares, none[:, 0])
        verdict = draw(state._judge, products, numbers, self._voters, 1, state.max_norm_ratio, self._limits, counted)
        self._kept, self._limits = verdict.kept, verdict.limits
        state.step += 1
        return average, verdict.agreement.kept

    def _limits_now(self, squares: Tensor) -> Tensor:
        """Return the first step's limits `(W, 1)`, of whose norms no verdict knows."""
        ratio = self._state.max_norm_ratio
        median = upper_median(squares.sqrt(), squares.isfinite() & (squares > 0))
        return ((math.inf if ratio is None else ratio) * median).expand(len(squares), 1)
