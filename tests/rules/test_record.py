"""What weightings may return and do, others' and the package's, and the record of a decision."""

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from gaf_ddp import Agreement, Mean, NeighborhoodAgreement, Weighting
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.weighting import cosine
from tests.gradients import agreeing_gradients, random_gradients
from tests.properties import gramian_of


class TestForeignWeightings:
    def test_see_the_voters_alone(self) -> None:
        seen = []

        def weighting(gramian: Tensor) -> Tensor:
            seen.append(gramian)
            return torch.tensor([0.25, 0.5])

        gramian = gramian_of(agreeing_gradients(4, 50))
        gramian[1, :] = gramian[:, 1] = 0
        gramian[3, 3] = math.nan
        found = decide(gramian, weighting, None)
        assert torch.equal(seen[0], gramian[[0, 2]][:, [0, 2]])
        assert found.weights.tolist() == [0.25, 0, 0.5, 0]

    def test_are_not_asked_when_nobody_votes(self) -> None:
        def weighting(gramian: Tensor) -> Tensor:
            raise AssertionError("there is nothing to weigh")

        assert decide(torch.zeros(3, 3), weighting, 10.0).agreed
        assert not decide(torch.full((3, 3), math.nan), weighting, 10.0).agreed

    def test_may_return_another_float_dtype_and_a_graph(self) -> None:
        found = decide(torch.eye(2), lambda g: torch.ones(2, dtype=torch.float64, requires_grad=True), 10.0)
        assert found.weights.dtype == torch.float32
        assert not found.weights.requires_grad

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize(
        ("weights", "found"),
        [
            (torch.ones(2), r"\(2,\) of torch.float32"),
            (torch.ones(3, 1), r"\(3, 1\) of torch.float32"),
            (torch.ones(3, dtype=torch.int64), r"\(3,\) of torch.int64"),
            (torch.ones(3, dtype=torch.bool), r"\(3,\) of torch.bool"),
            (None, "None"),
            ([1.0, 1.0, 1.0], r"\[1.0, 1.0, 1.0\]"),
            (torch.tensor([0.5, math.nan, 0.5]), r"\[0.5, nan, 0.5\]"),
            (torch.full((3,), math.nan), r"\[nan, nan, nan\]"),
            (torch.tensor([math.inf, 0.0, 0.0]), r"\[inf, 0.0, 0.0\]"),
            (torch.tensor([1.5, 0.0, -0.5]), r"\[1.5, 0.0, -0.5\]"),
        ],
    )
    def test_must_return_weights(self, weights: object, found: str, own: bool) -> None:
        class Odd(Weighting):
            def __call__(self, gramian: Tensor) -> Tensor:
                return weights  # type: ignore[return-value]

            def __repr__(self) -> str:
                return "Odd()"

        odd = Odd() if own else type("Foreign", (), {"__call__": Odd.__call__, "__repr__": Odd.__repr__})()
        rule = r"weighting must return finite weights >= 0, floating point of shape \(3,\), found "
        with pytest.raises(ValueError, match=rule + found + r" from Odd\(\)"):
            decide(torch.eye(3), odd, 10.0)


class Careless(Weighting):
    """A rule that changes what it is shown."""

    def __call__(self, gramian: Tensor) -> Tensor:
        weights = Mean()(gramian)
        gramian.fill_(7.0)
        return weights


@pytest.mark.parametrize("careless", [Careless(), Careless().__call__])
def test_a_weighting_that_changes_its_argument_does_not_change_the_record(
    careless: Callable[[Tensor], Tensor],
) -> None:
    for bad in (slice(0), slice(1, 3)):
        gradients = random_gradients(5, 100)
        gradients[bad], gradients[3] = math.nan, 1000 * gradients[3]
        found = decide(gramian_of(gradients), careless, 10.0)
        expected = decide(gramian_of(gradients), Mean(), 10.0)
        for field in fields(Agreement):
            left, right = getattr(found, field.name), getattr(expected, field.name)
            torch.testing.assert_close(left, right, rtol=0, atol=1e-15, equal_nan=True, msg=field.name)


def test_the_record_is_complete() -> None:
    gradients = random_gradients(4, 100)
    gradients[2] = math.nan
    gramian = gramian_of(gradients)
    found = decide(gramian, NeighborhoodAgreement(0.9), 10.0)
    assert found.gramian is gramian  # as measured
    torch.testing.assert_close(found.cosine, cosine(gramian))
    values = {field.name: getattr(found, field.name) for field in fields(Agreement)}
    assert {name: None if value is None else (value.dtype, value.shape) for name, value in values.items()} == {
        "gramian": (torch.float64, (4, 4)),
        "cosine": (torch.float64, (4, 4)),
        "weights": (torch.float64, (4,)),
        "kept": (torch.bool, (4,)),
        "agreed": (torch.bool, ()),
        "voters": (torch.bool, (4,)),
        "nonfinite": (torch.bool, (4,)),
        "overlong": (torch.bool, (4,)),
        "distance": None,  # the consensus rule's
        "flipped": None,
        "equal": None,
        "trusted": None,
        "condemned": None,
        "finished": None,  # of ballots
    }
    stacked = Agreement.stack([found, found])
    for name, value in values.items():
        if value is None:
            assert getattr(stacked, name) is None
        else:
            torch.testing.assert_close(getattr(stacked, name)[1], value, rtol=0, atol=0, equal_nan=True)
