"""One average compared with what ranks voted with: tolerances, guards, suspects and words."""

import math

import pytest
import torch
from torch import Tensor

from gaf_ddp.checks.sums import GUARDED, SumCheck, require_sums
from gaf_ddp.kernels.fold import fold, whole
from tests.checks.faults import error_of

K = 256


def checked(rows: Tensor, average: Tensor, kept: list[bool], dtype: torch.dtype = torch.float32) -> SumCheck:
    """Return a check of this average of the ranks' gradients `(W, N)`."""
    check = SumCheck(K)
    check.add(average, whole(len(average)), dtype)
    check.expect(torch.stack([fold(row, whole(len(row)), K)[0] for row in rows]), torch.tensor(kept))
    return check


class TestSumCheck:
    rows = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
    kept = (True, True, False, True, True)

    def off(self, check: SumCheck, rows: Tensor, kept: tuple[bool, ...] = kept) -> float:
        return float(check.off([float(row.norm()) for row, k in zip(rows, kept, strict=True) if k]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
    def test_rounding_of_a_ring_is_within_and_a_rank_that_is_missing_is_not(
        self, dtype: torch.dtype, scale: float
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        for world in (2, 8, 64):
            for common in (0.0, 1.0, math.inf):  # what ranks have in common; equal elements round alike
                rows = torch.randn(world, 3000, generator=generator) + min(common, 9.0)
                rows = torch.full_like(rows, 0.3) if math.isinf(common) else rows
                rows = (scale * rows).to(dtype)
                total = torch.zeros(3000, dtype=dtype)
                for row in rows:
                    total += row / world
                kept = (True,) * world
                assert self.off(checked(rows, total, list(kept), dtype), rows.float(), kept) < 0.7
                if world == 2:
                    assert self.off(checked(rows, total - rows[0] / 2, list(kept), dtype), rows.float(), kept) > 1

    def test_equals_zero_where_all_is_zero(self) -> None:
        rows = torch.zeros(5, 3000)
        assert self.off(checked(rows, rows[0], list(self.kept)), rows) == 0

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_sum_that_is_not_finite_is_off_but_in_float16(self, value: float) -> None:
        average = self.rows[list(self.kept)].mean(0)
        average[7] = value
        assert not self.off(checked(self.rows, average, list(self.kept)), self.rows) <= 1
        assert self.off(checked(self.rows, average, list(self.kept), torch.float16), self.rows) == GUARDED
        broken = self.rows.clone()
        broken[0, 7] = value
        assert self.off(checked(broken, average, list(self.kept)), broken) == GUARDED

    def test_who_is_shortened_or_left_out_of_some_steps_says_so(self) -> None:
        average = self.rows.mean(0)  # of others than those that count
        cases = [([4.0, 9.0], 4.0, False), ([4.0, 9.0], 2.9, True), ([0.0, 9.0], 4.0, True), ([0.0, 0.0], 4.0, False)]
        for squares, limit, guarded in cases:
            check = checked(self.rows, average, list(self.kept))
            limits = torch.tensor([limit, math.inf], dtype=torch.float64).unbind()
            check.guard([torch.tensor(squares, dtype=torch.float64), torch.ones(2, dtype=torch.float64)], limits)
            assert (self.off(check, self.rows) == GUARDED) == guarded

    def test_suspects_whose_gradient_is_lacking_and_then_who_sent_too_much(self) -> None:
        rows, kept = self.rows, self.rows[list(self.kept)]
        average = kept.mean(0)
        cases: list[tuple[Tensor, list[int]]] = [
            (average - rows[3] / 4, [3]),
            (kept[[0, 1, 3]].mean(0), [3]),
            (average + rows[1] / 4, [1]),
            (average + rows[2] / 4, [2]),  # left out, and sends all the same
            (average + (rows[0] - rows[1]) / 4, [1]),
            (average - (rows[0] + rows[4]) / 4, [0, 4]),
            (average * math.nan, []),
        ]
        for found, suspects in cases:
            assert checked(rows, found, list(self.kept)).suspects() == suspects


@pytest.mark.parametrize(
    ("off", "said"),
    [
        ([0.0, 0.9, 1.0], "nothing"),
        ([0.0, 3.0, GUARDED], "nothing"),
        ([0.0, 31.0, 0.1], "on ranks 1 (b): 3.1e+01 times as far off as rounding explains: is a device"),
        ([math.nan, 0.0, math.inf], "on ranks 0 (a): nan, 2 (c): inf times as far off as rounding explains, as if"),
        ([2.0, 2.0, 2.0], "as if rank 2 (c) had sent another gradient, or had been left out: is a device, a network"),
    ],
    ids=str,
)
def test_the_words_name_who_is_off_and_who_may_be_why(off: list[float], said: str) -> None:
    assert said in error_of(lambda: require_sums(off, ["a 0", "b", "c"], lambda: [2]))
