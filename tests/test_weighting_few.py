"""Decisions in plain numbers against the same in tensor operations, field by field."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from gaf_ddp import Agreement, ConsensusAgreement, Mean, NeighborhoodAgreement, SequentialAgreement, Weighting
from gaf_ddp.rules.agreement import decide
from tests.gradients import agreeing_gradients, random_gradients
from tests.properties import gramian_of

FEW = 16  # up to so many ranks plain numbers are faster


class InTensors(Mean):
    """The same rule in tensors; only the very class has the faster way."""


class NeighborhoodInTensors(NeighborhoodAgreement):
    """As above."""


class SequentialInTensors(SequentialAgreement):
    """As above."""


class ConsensusInTensors(ConsensusAgreement):
    """As above."""


def rules(tau: float) -> list[tuple[Weighting, Weighting]]:
    """Return each rule with the same in tensors."""
    return [
        (Mean(), InTensors()),
        *((ConsensusAgreement(ratio), ConsensusInTensors(ratio)) for ratio in (1.5, 3.0)),
        (NeighborhoodAgreement(tau), NeighborhoodInTensors(tau)),
        (SequentialAgreement(tau), SequentialInTensors(tau)),
        (SequentialAgreement(tau, running="half"), SequentialInTensors(tau, running="half")),
    ]


def spoilt(gramian: Tensor, seed: int) -> Tensor:
    """Return the Gramian of the same ranks, some of them absent, not finite or too long."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0, 100.0, math.nan, math.inf])
    chosen = factor[torch.randint(len(factor), (len(gramian),), generator=generator)]
    return gramian * (chosen[:, None] * chosen[None, :]).to(gramian)


def assert_same(gramian: Tensor, tau: float, ratio: float | None) -> None:
    for fast, in_tensors in rules(tau):
        found, expected = decide(gramian, fast, ratio), decide(gramian, in_tensors, ratio)
        for field in fields(Agreement):
            left, right = getattr(found, field.name), getattr(expected, field.name)
            tolerance = 1e-15 * (field.name == "cosine")
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance, equal_nan=True, msg=repr(fast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, FEW])
def test_every_field_is_the_same(world_size: int, dtype: torch.dtype) -> None:
    for seed in range(6):
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


class Both(Weighting):
    """A user's rule, which keeps the first voter; it notes which way it was asked."""

    def __init__(self, answer: object = None) -> None:
        self.asked: list[str] = []
        self.answer = answer

    def __call__(self, gramian: Tensor) -> Tensor:
        self.asked.append("tensors")
        return (gramian.diagonal() > 0).cumsum(0).eq(1) * (gramian.diagonal() > 0).to(gramian)

    def of_few(self, gramian: list[list[float]], voters: list[int]) -> Any:
        self.asked.append("numbers")
        return {voters[0]: 3.0} if self.answer is None else self.answer


class Heir(Both):
    """Has the numbers from a class above: they may not be its own rule's."""


@pytest.mark.parametrize(
    ("rule", "world_size", "way"),
    [(Both(), FEW, "numbers"), (Both(), FEW + 1, "tensors"), (Heir(), 2, "tensors")],
)
def test_numbers_are_asked_of_few_ranks_and_of_the_very_class(rule: Both, world_size: int, way: str) -> None:
    gramian = torch.eye(world_size)
    gramian[0, 0] = 0
    assert decide(gramian, rule, 10.0).weights.nonzero().flatten().tolist() == [1]
    assert rule.asked == [way]


@pytest.mark.parametrize("answer", [[1.0, 1.0], {0: 1.0}, {1: math.nan}, {1: math.inf}, {1: -1.0, 2: 2.0}])
def test_what_counts_must_be_numbers_of_voters(answer: object) -> None:
    rule = r"of_few must return what voters count, finite and >= 0, by their ranks among \[1, 2\], found "
    with pytest.raises(ValueError, match=rule) as error:
        decide(torch.diag(torch.tensor([0.0, 1.0, 1.0])), Both(answer), 10.0)
    assert f"found {answer!r} from <" in str(error.value)


def test_nothing_counted_is_no_agreement() -> None:
    for answer in ({}, {0: 0.0}):
        found = decide(torch.eye(2), Both(answer), 10.0)
        assert found.weights.tolist() == [0, 0]
        assert not found.agreed
