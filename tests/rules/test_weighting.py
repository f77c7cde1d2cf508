"""Weightings: properties of every rule, and the rules against explicit vectors."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gaf_ddp import ConsensusAgreement, Mean, NeighborhoodAgreement, SequentialAgreement, Weighting
from gaf_ddp.rules.weighting import cosine, require_tau
from tests import oracle
from tests.gradients import random_gradients
from tests.properties import (
    assert_blind_to_absent,
    assert_convex,
    assert_keeps,
    assert_permutation_equivariant,
    assert_pure,
    assert_row_scale_invariant,
    assert_scale_invariant,
    gramian_of,
)

TAUS = [0.6, 0.9, 1.2]
RULES: list[tuple[Weighting, oracle.Rule]] = [
    (Mean(), oracle.mean),
    *[(NeighborhoodAgreement(tau), oracle.neighborhood(tau)) for tau in TAUS],
    *[(SequentialAgreement(tau), oracle.sequential(tau)) for tau in TAUS],
    *[(SequentialAgreement(tau, running="half"), oracle.sequential(tau, "half")) for tau in TAUS],
]
FILTERS = [NeighborhoodAgreement, SequentialAgreement, lambda tau: SequentialAgreement(tau, running="half")]

WITHOUT_THRESHOLD = [ConsensusAgreement(), ConsensusAgreement(1.5)]

every_rule = pytest.mark.parametrize("weighting", [*(w for w, _ in RULES), *WITHOUT_THRESHOLD], ids=repr)
every_filter = pytest.mark.parametrize("make", FILTERS, ids=["neighborhood", "sequential", "half"])


def some_gramians(*world_sizes: int) -> Iterator[Tensor]:
    for world_size in world_sizes or (1, 2, 3, 7):
        for seed in range(3):
            yield gramian_of(random_gradients(world_size, 200, seed))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("weighting", "rule"), RULES, ids=lambda x: repr(x) if isinstance(x, Weighting) else "")
def test_rules_equal_the_oracle(weighting: Weighting, rule: oracle.Rule, world_size: int) -> None:
    for seed in range(6):
        gradients = random_gradients(world_size, 200, seed)
        expected = oracle.filtered(list(gradients), rule)
        weights = weighting(gramian_of(gradients))
        assert weights.nonzero().flatten().tolist() == expected.kept, f"seed {seed}"
        torch.testing.assert_close(weights @ gradients.double(), expected.gradient, rtol=1e-10, atol=1e-12)


@every_rule
class TestEveryRule:
    def test_gives_shares(self, weighting: Weighting) -> None:
        for gramian in some_gramians():
            assert_convex(weighting, gramian)

    def test_is_pure_and_never_waits(self, weighting: Weighting) -> None:
        for gramian in some_gramians(1, 7):
            assert_pure(weighting, gramian)
            assert_pure(weighting, gramian.float())

    def test_ignores_the_scale(self, weighting: Weighting) -> None:
        for gramian in some_gramians():
            for factor in (1e-15, 1e-3, 1e3, 1e15):  # float32 squares end at norms of about 1e-19 and 1e19
                assert_scale_invariant(weighting, gramian.float(), factor)

    @pytest.mark.parametrize("entry", [0.0, math.nan, math.inf, -math.inf])
    def test_is_blind_to_absent_ranks(self, weighting: Weighting, entry: float) -> None:
        for gramian in some_gramians(1, 2, 6):
            for rank in range(len(gramian) + 1):
                assert_blind_to_absent(weighting, gramian, rank, entry)

    @pytest.mark.parametrize("entry", [0.0, math.nan, math.inf])
    def test_gives_nothing_to_nobody(self, weighting: Weighting, entry: float) -> None:
        for world_size in (1, 2, 7):
            assert_keeps(weighting, torch.full((world_size, world_size), entry), [])

    def test_reads_the_diagonal_to_see_who_is_absent(self, weighting: Weighting) -> None:
        for gramian in some_gramians():
            absent = gramian.clone()
            absent[0, :] = absent[:, 0] = 0
            gramian[0, 0] = math.nan  # with finite products beside it
            assert torch.equal(weighting(gramian), weighting(absent))


@pytest.mark.parametrize("weighting", [Mean(), *map(NeighborhoodAgreement, TAUS), *WITHOUT_THRESHOLD], ids=repr)
def test_rules_without_order_follow_a_permutation(weighting: Weighting) -> None:
    for gramian in some_gramians(3, 7, 16):
        for seed in range(5):
            order = torch.randperm(len(gramian), generator=torch.Generator().manual_seed(seed))
            assert_permutation_equivariant(weighting, gramian, order)


@pytest.mark.parametrize("weighting", [Mean(), *map(NeighborhoodAgreement, TAUS)], ids=repr)
def test_rules_by_cosines_ignore_the_scale_of_each_rank(weighting: Weighting) -> None:
    for gramian in some_gramians():
        factors = torch.logspace(-2, 2, len(gramian), dtype=gramian.dtype)
        assert_row_scale_invariant(weighting, gramian, factors)


@every_filter
class TestEveryFilter:
    def test_tau_2_keeps_every_voter(self, make: type) -> None:
        for gramian in some_gramians():
            assert_keeps(make(2.0), gramian, list(range(len(gramian))))

    def test_tau_2_keeps_opposites(self, make: type) -> None:
        g = random_gradients(1, 50)
        assert_keeps(make(2.0), gramian_of(torch.cat([g, -g, -3 * g])).float(), [0, 1, 2])

    def test_tau_0_keeps_copies(self, make: type) -> None:
        # As float32, which gradients' Gramians are; in float64 a running sum of five copies rounds.
        for world_size in (2, 3, 7):
            for seed in range(5):
                g = random_gradients(1, 999, seed)
                assert_keeps(make(0.0), (g @ g.T).repeat(world_size, world_size), list(range(world_size)))

    def test_at_exactly_tau_two_gradients_agree(self, make: type) -> None:
        assert_keeps(make(1.0), torch.eye(2), [0, 1])
        assert_keeps(make(math.nextafter(1.0, 0.0)), torch.eye(2), [])

    def test_a_single_voter_passes(self, make: type) -> None:
        gramian = torch.zeros(5, 5)
        gramian[3, 3] = 2.0
        assert make(0.0)(gramian).tolist() == [0, 0, 0, 1, 0]
        assert make(0.0)(torch.tensor([[7.0]])).tolist() == [1]

    def test_one_of_several_voters_is_no_agreement(self, make: type) -> None:
        assert_keeps(make(0.5), torch.eye(7), [])

    def test_two_ranks_are_judged_alike_by_all(self, make: type) -> None:
        for gramian, tau in itertools.product(some_gramians(2), (0.3, 0.8, 1.0, 1.3)):
            assert torch.equal(make(tau)(gramian), NeighborhoodAgreement(tau)(gramian))

    @pytest.mark.parametrize("tau", [-0.001, 2.001, math.nan, math.inf, "1", None, True])
    def test_refuses_a_tau_out_of_range(self, make: type, tau: object) -> None:
        with pytest.raises(ValueError, match=r"tau must be a cosine distance in \[0, 2\], found") as error:
            make(tau)
        assert repr(tau) in str(error.value)


def test_cosines_are_one_for_copies_and_zero_beside_absent_ranks() -> None:
    gradients = random_gradients(4, 100)
    gradients[1], gradients[2] = 3 * gradients[0], 0
    found = cosine(gramian_of(gradients).float())
    expected = torch.nn.functional.cosine_similarity(gradients[:, None].double(), gradients[None].double(), dim=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.diagonal().tolist() == [1, 1, 0, 1]
    assert found.abs().max().item() <= 1


@every_rule
def test_repr_is_the_constructor_call(weighting: Weighting) -> None:
    again = eval(repr(weighting))
    assert type(again) is type(weighting)
    assert vars(again) == vars(weighting)


def test_require_tau_takes_any_number_in_range() -> None:
    assert [require_tau(tau) for tau in (0, 1, 2, 0.97)] == [0.0, 1.0, 2.0, 0.97]
