"""The rule without a threshold, as a function of one Gramian: against explicit vectors in float64, its properties."""

import math
from collections.abc import Callable
from itertools import product
from statistics import median_high, median_low

import pytest
import torch
from torch import Tensor

from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.consensus import ConsensusAgreement, distances
from gaf_ddp.rules.medians import lower_median, upper_median
from tests.gradients import agreeing_gradients, random_gradients
from tests.properties import (
    assert_blind_to_absent,
    assert_convex,
    assert_keeps,
    assert_permutation_equivariant,
    assert_pure,
    assert_scale_invariant,
    gramian_of,
)
from tests.rules.consensus_oracle import judge as judge_by_hand
from tests.rules.consensus_oracle import kept_by
from tests.syncs import HostSyncs

WORLD_SIZES = (1, 2, 3, 4, 7, 8, 16)
RULE = ConsensusAgreement()


def minority(world_size: int, seed: int) -> list[int]:
    """Return fewer than half of the ranks."""
    order: list[int] = torch.randperm(world_size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: (world_size - 1) // 2])


def outliers(world_size: int, size: int = 60, seed: int = 0) -> Tensor:
    """Return vectors `(W, n)` float64 that are alike, but for a minority of two kinds: far, and turned around."""
    vectors, bad = agreeing_gradients(world_size, size, seed=seed).double(), minority(world_size, seed)
    vectors[bad[::2]] *= -2
    vectors[bad[1::2]] += 5 * agreeing_gradients(1, size, seed=100 + seed)
    return vectors


@pytest.mark.parametrize("kind", [random_gradients, agreeing_gradients, outliers])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_rule_is_that_of_explicit_vectors(world_size: int, kind: Callable[..., Tensor]) -> None:
    for seed, ratio in product(range(10), (1.5, 3.0)):
        vectors, voters = kind(world_size, 60, seed=seed).double(), list(range(world_size))
        gramian = gramian_of(vectors)
        expected = judge_by_hand(list(vectors), voters)
        z, members = distances(gramian, torch.ones(world_size, dtype=torch.bool))
        torch.testing.assert_close(z, torch.tensor([expected.z[i] for i in voters]).double(), rtol=1e-6, atol=1e-6)
        assert members.nonzero().flatten().tolist() == expected.members
        assert_keeps(ConsensusAgreement(ratio), gramian, kept_by(list(vectors), voters, ratio))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_minority_of_bad_ranks_is_left_out(world_size: int) -> None:
    for seed in range(10):
        good = [i for i in range(world_size) if i not in minority(world_size, seed)]
        assert_keeps(RULE, gramian_of(outliers(world_size, seed=seed)), good)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_that_all_differ_alike_are_all_kept(world_size: int) -> None:
    disjoint = torch.eye(world_size, 40, dtype=torch.float64) * 3 + 0.01 * agreeing_gradients(world_size, 40)
    assert_keeps(RULE, gramian_of(disjoint), list(range(world_size)))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_properties(world_size: int) -> None:
    for seed in range(5):
        for vectors in (random_gradients(world_size, 60, seed=seed), outliers(world_size, seed=seed).float()):
            for gramian in (gramian_of(vectors), gramian_of(vectors).float()):
                assert_convex(RULE, gramian)
                assert_pure(RULE, gramian)
            gramian = gramian_of(vectors)
            order = torch.randperm(world_size, generator=torch.Generator().manual_seed(seed))
            assert_permutation_equivariant(RULE, gramian, order)
            for factor in (1e-30, 3.0, 1e30):
                assert_scale_invariant(RULE, gramian, factor)
            for entry in (0.0, math.nan, math.inf):
                assert_blind_to_absent(RULE, gramian, rank=world_size // 2, entry=entry)


def test_a_common_part_changes_nothing() -> None:
    vectors, common = outliers(7), 100 * agreeing_gradients(1, 60, seed=5).double()
    torch.testing.assert_close(RULE(gramian_of(vectors + common)), RULE(gramian_of(vectors)))


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 16])
def test_copies_are_kept_though_they_differ_by_rounding(world_size: int) -> None:
    vectors = agreeing_gradients(1, 5000).repeat(world_size, 1)
    assert_keeps(RULE, gramian_of(vectors), list(range(world_size)))
    nearly = vectors * (1 + 1e-6 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)))
    assert_keeps(RULE, (nearly @ nearly.T), list(range(world_size)))
    odd = nearly.clone()
    odd[0] += 0.1 * agreeing_gradients(1, 5000, seed=1)[0]
    assert_keeps(RULE, odd @ odd.T, list(range(world_size))[(world_size > 2) :])


def test_copies_of_a_bad_rank_count_each() -> None:
    vectors = agreeing_gradients(5, 60).double()
    bad = -vectors[:1]
    assert_keeps(RULE, gramian_of(torch.cat([vectors, bad, bad])), [0, 1, 2, 3, 4])
    assert_keeps(RULE, gramian_of(torch.cat([vectors[:2], bad, bad, bad])), [2, 3, 4])


@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 2, 3]])
def test_ties_do_not_depend_on_the_order(kept: list[int]) -> None:
    # On a line, 1 and 2 have their second nearest at 4; the nearest others of 1 are nearer, or those of 2.
    line = torch.tensor([[0.0], [1.0], [5.0], [9.0]]) if kept[0] == 0 else torch.tensor([[0.0], [4.0], [8.0], [9.0]])
    gramian = gramian_of(line + torch.tensor([100.0]))
    everyone = torch.ones(4, dtype=torch.bool)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        _, members = distances(gramian[order][:, order], everyone)
        assert sorted(order[i] for i in members.nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, 1e-38, 1e38])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_gramians_of_one_number(fill: float, world_size: int) -> None:
    gramian = torch.full((world_size, world_size), fill)
    assert_convex(RULE, gramian)
    assert_keeps(RULE, gramian, list(range(world_size)) if fill > 0 else [])


def test_the_guards_come_first() -> None:
    vectors = agreeing_gradients(6, 60)
    vectors[0], vectors[2], vectors[5] = torch.nan, 0, 1000 * vectors[5]
    record = decide(gramian_of(vectors), RULE, 10.0)
    torch.testing.assert_close(record.weights, torch.tensor([0, 1 / 3, 0, 1 / 3, 1 / 3, 0]).double())
    assert record.agreed


@pytest.mark.parametrize("ratio", [1, 0.5, -3.0, math.nan, "3", None, True])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio must be a number > 1, found "):
        ConsensusAgreement(ratio)


def test_the_name_is_the_constructor_call() -> None:
    assert repr(RULE) == "ConsensusAgreement(ratio=3.0)"
    assert ConsensusAgreement(2).ratio == 2.0


def test_distances_never_wait_for_the_device() -> None:
    gramian, voters = gramian_of(outliers(5)), torch.tensor([True, True, True, False, True])
    with HostSyncs() as syncs:
        distances(gramian, voters)
    assert syncs.calls == []


@pytest.mark.parametrize("count", range(1, 7))
def test_medians_are_those_of_the_chosen(count: int) -> None:
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(count))
    chosen = torch.zeros(8, 3, dtype=torch.bool)
    chosen[8 - count :] = True
    columns = [values[8 - count :, column].tolist() for column in range(3)]
    assert upper_median(values, chosen).tolist() == [median_high(column) for column in columns]
    assert [upper_median(values[:, i], chosen[:, i]) for i in range(3)] == [median_high(column) for column in columns]
    assert [lower_median(values[:, i], chosen[:, i]) for i in range(3)] == [median_low(column) for column in columns]
    assert upper_median(values, chosen & False).tolist() == [math.inf] * 3
