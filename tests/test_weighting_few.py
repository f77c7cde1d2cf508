"""Decisions in plain numbers against the same in tensor operations, field by field."""

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from gaf_ddp import Agreement, NeighborhoodAgreement, SequentialAgreement, Weighting, _few_ranks
from gaf_ddp.agreement import decide
from tests.gradients import agreeing_gradients, random_gradients
from tests.properties import gramian_of


class Neighborhood(NeighborhoodAgreement):
    """The same rule in tensors; only the very class has the faster way."""


class Sequential(SequentialAgreement):
    """As above."""


def rules(tau: float) -> list[tuple[Weighting, Weighting]]:
    """Return each rule with the same in tensors."""
    return [
        (NeighborhoodAgreement(tau), Neighborhood(tau)),
        (SequentialAgreement(tau), Sequential(tau)),
        (SequentialAgreement(tau, running="half"), Sequential(tau, running="half")),
    ]


def spoilt(gramian: Tensor, seed: int) -> Tensor:
    """Return the Gramian of the same ranks, some of them absent, not finite or too long."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0, 100.0, math.nan, math.inf])
    chosen = factor[torch.randint(len(factor), (len(gramian),), generator=generator)]
    return gramian * (chosen[:, None] * chosen[None, :]).to(gramian)


def assert_same(gramian: Tensor, tau: float, ratio: float | None) -> None:
    for fast, in_tensors in rules(tau):
        assert _few_ranks.can_decide(gramian, fast)
        assert not _few_ranks.can_decide(gramian, in_tensors)
        found, expected = decide(gramian, fast, ratio), decide(gramian, in_tensors, ratio)
        for field in fields(Agreement):
            left, right = getattr(found, field.name), getattr(expected, field.name)
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            tolerance = 1e-15 * (field.name == "cosine")
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance, equal_nan=True, msg=repr(fast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, _few_ranks.MOST])
def test_every_field_is_the_same(world_size: int, dtype: torch.dtype) -> None:
    for seed in range(20):
        gramian = gramian_of(random_gradients(world_size, 50, seed=seed)).to(dtype)
        for tau in (0.0, 0.7, 1.0, 2.0):
            for ratio in (None, 1.0, 10.0):
                assert_same(gramian, tau, ratio)
                assert_same(spoilt(gramian, seed), tau, ratio)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, math.nan, math.inf, 1e-38])
def test_gramians_of_one_number(fill: float, world_size: int) -> None:
    assert_same(torch.full((world_size, world_size), fill), 0.9, 10.0)


def test_copies_tie_and_the_lowest_rank_wins() -> None:
    one, other = agreeing_gradients(2, 40)
    for rows in ([one, -one, one, -one], [one, one, -other, -other], [one, other, one, other, one]):
        assert_same(gramian_of(torch.stack(rows)), 0.05, 10.0)


def test_more_ranks_are_left_to_tensor_operations() -> None:
    gramian = torch.ones(_few_ranks.MOST + 1, _few_ranks.MOST + 1)
    assert not _few_ranks.can_decide(gramian, NeighborhoodAgreement(1.0))
