"""How long gradients may be by a verdict, and who was guarded in the steps it is about."""

import math

import pytest
import torch
from torch import Tensor

from gaf_ddp.ballots.ballot import Numbers
from gaf_ddp.ballots.judge import Judge
from gaf_ddp.ballots.verdict import Verdict, draw
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.rules.memory import MOMENTUM


def verdict(norms: Tensor, limits: Tensor, ratio: float | None = 10.0, steps: int = 1) -> Verdict:
    """Return the verdict on ranks with these norms `(W, buckets)`, whose sketches are alike."""
    count = len(norms)
    judge, none = Judge(3.0, MOMENTUM), torch.zeros(count, 2, dtype=torch.float64)
    squares, zero = norms.double().square() * steps, none[:, 0]
    numbers = Numbers(squares, zero, none, zero, zero, zero, none, squares.sum(1), zero)
    voters = Voters(list(range(count)))
    sketches = torch.where(norms.sum(1, keepdim=True).isfinite(), torch.ones(count, 64), math.nan)
    products = judge.tally(voters.mean(sketches), steps)
    everyone = torch.ones(count, dtype=torch.bool)
    return draw(judge, products, numbers, voters, steps, ratio, limits.double(), everyone)


@pytest.mark.parametrize("steps", [1, 4])
def test_limits_are_upper_medians_of_those_who_count_bucket_by_bucket(steps: int) -> None:
    norms = torch.tensor([[1.0, 0.0], [2.0, 4.0], [3.0, 5.0], [4.0, math.nan]])
    found = verdict(norms, torch.full((2,), math.inf), steps=steps)
    torch.testing.assert_close(found.limits, torch.tensor([[20.0, 50.0]] * 4).double())
    assert found.agreement.nonfinite.tolist() == [False, False, False, True]
    assert found.guarded


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_a_limit_holds_on_where_nobody_had_a_gradient(norm: float) -> None:
    norms = torch.tensor([[norm, 1.0]]).repeat(3, 1) if norm == 0 else torch.full((3, 2), norm)
    assert verdict(norms, torch.tensor([[7.0, 8.0]] * 3)).limits.tolist() == [[7, 10 if norm == 0 else 8]] * 3


def test_no_ratio_is_no_limit() -> None:
    assert verdict(torch.ones(3, 2), torch.full((2,), math.inf), ratio=None).limits.tolist() == [[math.inf] * 2] * 3


def test_who_is_longer_than_the_limit_is_told() -> None:
    found = verdict(torch.tensor([[1.0, 1.0], [1.0, 9.0], [1.0, 1.0]]), torch.tensor([8.0, 8.0]))
    assert found.agreement.overlong.tolist() == [False, True, False]
    assert found.guarded
    assert not verdict(torch.ones(3, 2), torch.tensor([8.0, 8.0])).guarded
