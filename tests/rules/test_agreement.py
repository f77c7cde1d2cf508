"""decide: who votes, what is recorded, and that nothing waits for the device."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gaf_ddp import Mean, NeighborhoodAgreement, SequentialAgreement, Weighting
from gaf_ddp.rules.agreement import decide
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
    monkeypatch.setattr("gaf_ddp.runtime.device._HOST", "no device")  # on the CPU there is nothing to wait for
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

    def test_the_guard_is_in_units_of_the_upper_median(self) -> None:
        # Norms 1, 2, 4, 42: the lower median is 2, the upper 4.
        gramian = torch.diag(torch.tensor([1.0, 4.0, 16.0, 1764.0]))
        assert decide(gramian, Mean(), 10.0).overlong.tolist() == [False, False, False, True]
        assert not decide(gramian, Mean(), 10.5).overlong.any()  # at exactly the ratio it votes
        # Absent ranks have no part in the median.
        wider = torch.diag(torch.tensor([0.0, 0.0, math.nan, 1.0, 4.0, 16.0, 1764.0]))
        assert decide(wider, Mean(), 10.0).overlong.tolist() == [False] * 6 + [True]

    @pytest.mark.parametrize("world_size", [2, 4, 8])
    def test_half_of_the_ranks_never_leave_out_the_other_half(self, world_size: int) -> None:
        norms = torch.tensor([1e-3, 1.0]).repeat(world_size // 2)
        assert decide(torch.diag(norms**2), Mean(), 10.0).weights.tolist() == [1 / world_size] * world_size

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
