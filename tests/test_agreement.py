"""decide: who votes, what is recorded, and that nothing waits for the device."""

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from gaf_ddp import Agreement, Mean, NeighborhoodAgreement, SequentialAgreement, Weighting
from gaf_ddp import device as devices
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.weighting import cosine
from tests import oracle
from tests.gradients import agreeing_gradients, random_gradients
from tests.properties import gramian_of
from tests.syncs import HostSyncs

OWN = [Mean(), NeighborhoodAgreement(0.8), SequentialAgreement(0.8), SequentialAgreement(0.8, running="half")]
every_own = pytest.mark.parametrize("weighting", OWN, ids=repr)

Spoil = Callable[[Tensor], None]


def nothing(gradients: Tensor) -> None:
    pass


def zero(gradients: Tensor) -> None:
    gradients[1] = 0


def nan(gradients: Tensor) -> None:
    gradients[2, 3] = math.nan


def inf(gradients: Tensor) -> None:
    gradients[0, 0] = -math.inf


def long(gradients: Tensor) -> None:
    gradients[3] *= 1000


def several(gradients: Tensor) -> None:
    zero(gradients)
    nan(gradients)
    long(gradients)


def all_zero(gradients: Tensor) -> None:
    gradients.zero_()


def all_nan(gradients: Tensor) -> None:
    gradients.fill_(math.nan)


def zero_or_nan(gradients: Tensor) -> None:
    all_zero(gradients)
    nan(gradients)


every_spoil = pytest.mark.parametrize(
    "spoil", [nothing, zero, nan, inf, long, several, all_zero, all_nan, zero_or_nan], ids=lambda f: f.__name__
)


@every_spoil
@pytest.mark.parametrize("ratio", [10.0, None])
@pytest.mark.parametrize(
    ("weighting", "rule"),
    [
        (Mean(), oracle.mean),
        (NeighborhoodAgreement(0.8), oracle.neighborhood(0.8)),
        (SequentialAgreement(0.8), oracle.sequential(0.8)),
        (lambda gramian: torch.full_like(gramian[0], 1 / len(gramian)), oracle.mean),
    ],
    ids=["mean", "neighborhood", "sequential", "foreign"],
)
def test_decide_equals_the_oracle(
    weighting: Callable[[Tensor], Tensor], rule: oracle.Rule, spoil: Spoil, ratio: float | None
) -> None:
    for world_size in (4, 5, 7):
        gradients = random_gradients(world_size, 300, seed=world_size)
        spoil(gradients)
        expected = oracle.filtered(list(gradients), rule, ratio)
        found = decide(gramian_of(gradients), weighting, ratio)
        assert found.kept.nonzero().flatten().tolist() == expected.kept
        assert found.voters.nonzero().flatten().tolist() == oracle.present(list(gradients.double()), ratio)
        assert found.agreed.item() == (bool(expected.kept) or not gradients.any())
        if expected.gradient.isnan().any():
            assert found.weights.isnan().all()
        else:
            present = gradients.double().nan_to_num(0, 0, 0)
            oracle.assert_close(found.weights @ present, expected.gradient, 1e-10)


@every_own
@every_spoil
@pytest.mark.parametrize("ratio", [10.0, None])
def test_decide_never_waits(
    weighting: Weighting, spoil: Spoil, ratio: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_HOST", "no device")  # on the CPU there is nothing to wait for
    gradients = random_gradients(5, 100)
    spoil(gradients)
    inner = gramian_of(gradients)
    with HostSyncs() as syncs:
        decide(inner, weighting, ratio)
    assert syncs.calls == []


class TestVoters:
    def test_the_record_says_why_a_rank_has_no_vote(self) -> None:
        gradients = agreeing_gradients(6, 100)
        gradients[0], gradients[1, 5], gradients[2, 5] = 0, math.nan, math.inf
        gradients[4] *= 1000
        found = decide(gramian_of(gradients), NeighborhoodAgreement(1.0), 10.0)
        assert found.voters.tolist() == [False, False, False, True, False, True]
        assert found.nonfinite.tolist() == [False, True, True, False, False, False]
        assert found.overlong.tolist() == [False, False, False, False, True, False]
        assert found.kept.tolist() == found.voters.tolist()
        assert found.weights.tolist() == [0, 0, 0, 0.5, 0, 0.5]
        between = torch.zeros(6, 6, dtype=torch.bool)
        between[torch.tensor([[3], [5]]), torch.tensor([3, 5])] = True
        assert torch.equal(found.cosine != 0, between)

    @pytest.mark.parametrize("bad", range(4))
    def test_a_rank_at_1000_times_the_norm_is_left_out(self, bad: int) -> None:
        gradients = agreeing_gradients(4, 100)
        gradients[bad] *= 1000
        guarded = decide(gramian_of(gradients), Mean(), 10.0)
        assert guarded.overlong.nonzero().flatten().tolist() == [bad]
        assert guarded.weights[bad].item() == 0
        assert decide(gramian_of(gradients), Mean(), None).kept.all()

    def test_the_guard_is_in_units_of_the_lower_median(self) -> None:
        # Norms 1, 2, 5, 21: the lower median is 2, the upper 5.
        gramian = torch.diag(torch.tensor([1.0, 4.0, 25.0, 441.0]))
        assert decide(gramian, Mean(), 10.0).overlong.tolist() == [False, False, False, True]
        assert not decide(gramian, Mean(), 10.5).overlong.any()  # at exactly the ratio it votes
        # Absent ranks have no part in the median.
        wider = torch.diag(torch.tensor([0.0, 0.0, math.nan, 1.0, 4.0, 25.0, 441.0]))
        assert decide(wider, Mean(), 10.0).overlong.tolist() == [False] * 6 + [True]

    def test_of_two_ranks_the_shorter_is_the_median(self) -> None:
        assert decide(torch.diag(torch.tensor([1.0, 400.0])), Mean(), 10.0).weights.tolist() == [1, 0]

    def test_the_guard_ignores_the_common_scale(self) -> None:
        for norm in (1e-15, 1.0, 1e15):
            gramian = torch.diag(torch.tensor([1.0, 1.0, 400.0]) * norm**2)
            assert decide(gramian, Mean(), 10.0).overlong.tolist() == [False, False, True]


class TestDisagreement:
    def test_nothing_agreed(self) -> None:
        found = decide(torch.eye(3), NeighborhoodAgreement(0.5), 10.0)
        assert not found.agreed
        assert found.weights.tolist() == [0, 0, 0]

    def test_zero_gradients_are_no_disagreement(self) -> None:
        found = decide(torch.zeros(3, 3), NeighborhoodAgreement(0.5), 10.0)
        assert found.agreed
        assert found.weights.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("entries", [[math.nan, math.inf], [math.nan, 0.0]])
    def test_without_a_voter_but_with_nan_the_result_is_nan(self, entries: list[float]) -> None:
        found = decide(torch.diag(torch.tensor(entries)), NeighborhoodAgreement(0.5), 10.0)
        assert not found.agreed
        assert found.weights.isnan().all()
        assert not found.kept.any()


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


class CarelessInNumbers(Careless):
    def of_few(self, gramian: list[list[float]], voters: list[int]) -> dict[int, float]:
        counts = dict.fromkeys(voters, 1.0)
        voters.clear()
        for row in gramian:
            row[:] = [7.0] * len(row)
        return counts


@pytest.mark.parametrize("careless", [Careless(), Careless().__call__, CarelessInNumbers()])
def test_a_weighting_that_changes_its_argument_does_not_change_the_record(
    careless: Callable[[Tensor], Tensor],
) -> None:
    for spoil in (nothing, several):
        gradients = random_gradients(5, 100)
        spoil(gradients)
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
    }
    stacked = Agreement.stack([found, found])
    for name, value in values.items():
        if value is None:
            assert getattr(stacked, name) is None
        else:
            torch.testing.assert_close(getattr(stacked, name)[1], value, rtol=0, atol=0, equal_nan=True)
