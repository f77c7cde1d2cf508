"""The rule without a threshold: against explicit vectors in float64, its properties, and both of its ways."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from gaf_ddp import consensus_memory
from gaf_ddp.kernels.fold import fold
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.consensus import ConsensusAgreement, judge, judge_few
from gaf_ddp.rules.memory import MOMENTUM, Consensus, ConsensusMemory, find_flipped, find_flipped_few, move
from tests import oracle
from tests.consensus_oracle import ConsensusOracle, kept_by
from tests.consensus_oracle import judge as judge_by_hand
from tests.gradients import agreeing_gradients, random_gradients
from tests.marks import job_but
from tests.properties import (
    assert_blind_to_absent,
    assert_convex,
    assert_keeps,
    assert_permutation_equivariant,
    assert_pure,
    assert_scale_invariant,
    gramian_of,
)
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
        z, members = judge(gramian, torch.ones(world_size, dtype=torch.bool))
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
        _, members = judge(gramian[order][:, order], everyone)
        assert sorted(order[i] for i in members.nonzero().flatten().tolist()) == kept


def spoilt(gramian: Tensor, seed: int) -> Tensor:
    """Return the Gramian of the same ranks, some of them absent, not finite or too long."""
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0, 100.0, math.nan, math.inf])
    generator = torch.Generator().manual_seed(seed)
    chosen = factor[torch.randint(len(factor), (len(gramian),), generator=generator)]
    return gramian * (chosen[:, None] * chosen[None, :]).to(gramian)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_both_ways_are_the_same(world_size: int, dtype: torch.dtype) -> None:
    for seed, kind in product(range(20), (random_gradients, agreeing_gradients)):
        gramian = gramian_of(kind(world_size, 50, seed=seed)).to(dtype)
        votes = torch.rand(world_size, generator=torch.Generator().manual_seed(seed)) < 0.8
        for judged in (gramian, spoilt(gramian, seed)):
            voters = votes.nonzero().flatten().tolist()
            (z, members), (plain, inside) = judge(judged, votes), judge_few(judged.tolist(), voters)
            torch.testing.assert_close(z, torch.tensor(plain).double(), rtol=1e-6, atol=1e-6, equal_nan=True)
            assert members.nonzero().flatten().tolist() == inside
            clean = torch.where(votes[:, None] & votes[None, :], judged, 0)
            counts = RULE.of_few(clean.tolist(), [i for i in voters if 0 < judged[i, i] < math.inf])
            shares = [counts.get(i, 0) / max(len(counts), 1) for i in range(world_size)]
            assert RULE(clean).tolist() == torch.tensor(shares, dtype=dtype).tolist()


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
@pytest.mark.parametrize("kind", [ConsensusAgreement, ConsensusMemory])
def test_a_ratio_that_is_none_is_refused(kind: Callable[..., object], ratio: object) -> None:
    with pytest.raises(ValueError, match=r"ratio must be a number > 1, found "):
        kind(ratio)


def test_the_name_is_the_constructor_call() -> None:
    assert repr(RULE) == "ConsensusAgreement(ratio=3.0)"
    assert ConsensusAgreement(2).ratio == 2.0


# With a memory.


@pytest.fixture(params=["plain numbers", "tensors"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one of both ways, whatever W is."""
    monkeypatch.setattr(consensus_memory, "_FEW", 16 if request.param == "plain numbers" else 0)


class Ranks:
    """W ranks whose momenta are at hand, judged through their Gramians alone."""

    def __init__(self, world_size: int, size: int) -> None:
        self.momenta = torch.zeros(world_size, size, dtype=torch.float64)
        self.memory = ConsensusMemory()

    def step(self, gradients: Tensor) -> Consensus:
        gradients = gradients.double()
        self.momenta = MOMENTUM * self.momenta + gradients
        voters = torch.zeros(len(gradients), dtype=torch.bool)
        voters[oracle.present(list(gradients), 10.0)] = True
        found = self.memory.decide(gramian_of(self.momenta), gramian_of(gradients), voters)
        self.momenta = move(self.momenta, found.moves)
        return found


def training(world_size: int, steps: int, common: float = 0.5, size: int = 40, seed: int = 0) -> Tensor:
    """Return gradients `(S, W, n)`: a direction that turns, of this strength, and the ranks' noise, of about 1."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.linspace(0, 3, steps)[:, None]
    plane = torch.nn.functional.normalize(torch.randn(2, size, generator=generator))
    direction = angle.cos() * plane[0] + angle.sin() * plane[1]
    noise = torch.randn(steps, world_size, size, generator=generator) / size**0.5
    gradients: Tensor = common * direction[:, None] + noise
    return gradients


def burst(gradients: Tensor, rank: int, factor: float) -> Tensor:
    gradients[20:50, rank] *= factor
    return gradients


def absent(gradients: Tensor, rank: int) -> Tensor:
    gradients[0, rank] = gradients[15:30, rank] = 0
    gradients[40:, rank - 1] = 0
    return gradients


def none_here(gradients: Tensor, rank: int) -> Tensor:
    gradients[10, :] = 0
    gradients[11, :] = torch.nan
    gradients[30:32, rank:] = torch.nan
    return gradients


def nearly_copies(gradients: Tensor, rank: int) -> Tensor:
    gradients = gradients[:, :1] + 1e-5 * gradients
    gradients[30:, rank] *= -1
    return gradients


def coming_and_going(gradients: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    kind = torch.randint(8, gradients.shape[:2], generator=generator)[..., None]
    gradients = torch.where(kind == 0, 0, gradients)
    gradients = torch.where(kind == 1, torch.nan, gradients)
    return torch.where(kind == 2, 1000 * gradients, gradients)


SCENARIOS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": lambda g, rank: g,
    "x1000": lambda g, rank: burst(g, rank, 1000.0),
    "x-10": lambda g, rank: burst(g, rank, -10.0),
    "nan": lambda g, rank: burst(g, rank, math.nan),
    "inf": lambda g, rank: burst(g, rank, math.inf),
    "flipped": lambda g, rank: torch.cat([g[:5], torch.cat([g[5:, :rank], -g[5:, rank:]], 1)]),
    "absent": absent,
    "none here": none_here,
    "nearly copies": nearly_copies,
    "coming and going": coming_and_going,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", job_but(4, of=WORLD_SIZES))
def test_every_step_is_that_of_explicit_vectors(
    world_size: int, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = SCENARIOS[scenario](training(world_size, 64), world_size - 1)
    by_hand, both = ConsensusOracle(world_size, 40), {0: Ranks(world_size, 40), 16: Ranks(world_size, 40)}
    for step, rows in enumerate(gradients):
        expected = by_hand.step(rows)
        for few, ranks in both.items():
            monkeypatch.setattr(consensus_memory, "_FEW", few)
            found = ranks.step(rows)
            shares = [(i in expected.kept) / max(len(expected.kept), 1) for i in range(world_size)]
            assert found.weights.tolist() == shares, f"step {step}"
            assert found.flipped.nonzero().flatten().tolist() == expected.flipped, f"step {step}"
            z = torch.tensor(expected.z).double()
            torch.testing.assert_close(found.z, z, rtol=1e-6, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(ranks.momenta, by_hand.momenta - by_hand.mean, rtol=1e-9, atol=1e-9)


def kept_steps(gradients: Tensor, rank: int) -> list[bool]:
    """Return for each step whether the rank is kept."""
    ranks = Ranks(gradients.shape[1], gradients.shape[2])
    return [bool(ranks.step(rows).weights[rank]) for rows in gradients]


@pytest.mark.parametrize("factor", [1000.0, -10.0])
def test_a_burst_is_out_at_once_and_over_a_horizon_later(factor: float) -> None:
    kept = kept_steps(burst(training(4, 300), 2, factor), 2)
    assert all(kept[:20])
    assert not any(kept[22:50])
    assert all(kept[150:])


def test_nan_is_out_and_back_at_once() -> None:
    kept = kept_steps(burst(training(4, 100), 2, math.nan), 2)
    assert kept == [not 20 <= step < 50 for step in range(100)]


@pytest.mark.parametrize("away", [1, 10, 150])
@pytest.mark.parametrize("common", [0.5, 3.0])
def test_an_honest_rank_that_comes_back_is_kept(common: float, away: int) -> None:
    gradients = training(4, 300, common)
    gradients[100 : 100 + away, 1] = 0
    kept = kept_steps(gradients, 1)
    assert kept == [not 100 <= step < 100 + away for step in range(300)]


def test_a_bad_rank_that_comes_back_is_still_out() -> None:
    gradients = training(4, 200)
    gradients[:, 1] = training(1, 200, seed=7)[:, 0] * 2
    gradients[100:130, 1] = 0
    assert not any(kept_steps(gradients, 1)[90:])


@pytest.mark.usefixtures("way")
def test_a_turned_sign_that_momenta_do_not_show_is_found_after_50_steps() -> None:
    gradients = training(6, 150)
    gradients[1::2] -= 2 * (gradients - training(6, 150, common=0))[1::2]  # the common part turns at every step
    gradients[:, 3] *= -1
    ranks = Ranks(6, 40)
    found = [ranks.step(rows) for rows in gradients]
    assert not any(f.flipped.any() for f in found[:49])
    assert all(f.flipped.tolist() == [i == 3 for i in range(6)] for f in found[60:])
    assert all((f.z < 3).all() for f in found[60:])
    assert all(f.weights[3] == 0 for f in found[60:])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_flipped_ranks_both_ways(world_size: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * (torch.rand(world_size, generator=generator) < 0.2).double()
        similarity = signs[:, None] * signs * (0.3 + 0.1 * torch.rand(world_size, world_size, generator=generator))
        votes = torch.rand(world_size, generator=generator) < 0.8
        plain = find_flipped_few(similarity.tolist(), votes.nonzero().flatten().tolist())
        assert find_flipped(similarity, votes).nonzero().flatten().tolist() == plain


def test_a_pair_counts_from_its_own_50th_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[list[float]]] = []

    def find_nobody(similarity: list[list[float]], voters: list[int]) -> list[int]:
        asked.append(similarity)
        return []

    monkeypatch.setattr(consensus_memory, "find_flipped_few", find_nobody)
    gradients = training(3, 70)
    gradients[10:20, 2] = 0
    ranks = Ranks(3, 40)
    for rows in gradients:
        ranks.step(rows)
    first = {pair: next(s for s, m in enumerate(asked) if m[pair[0]][pair[1]]) for pair in ((0, 1), (0, 2))}
    assert first == {(0, 1): 49, (0, 2): 59}


def test_tensors_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consensus_memory, "_FEW", 0)
    memory, gramian = ConsensusMemory(), gramian_of(outliers(5))
    voters = torch.tensor([True, True, True, False, True])
    with HostSyncs() as syncs:
        for _ in range(2):
            found = memory.decide(gramian, gramian, voters)
            move(torch.ones(5, 7), found.moves)
    assert syncs.calls == []


@pytest.mark.usefixtures("way")
def test_what_is_remembered_can_be_saved() -> None:
    gradients = coming_and_going(training(4, 120), 3)
    whole, first, second = Ranks(4, 40), Ranks(4, 40), Ranks(4, 40)
    expected = [whole.step(rows) for rows in gradients][-1]
    for rows in gradients[:70]:
        first.step(rows)
    state = first.memory.state_dict()
    first.step(gradients[70])  # what was saved stays as it was
    second.memory.load_state_dict(state)
    replay = Ranks(4, 40)
    for rows in gradients[:70]:
        replay.step(rows)
    second.momenta = replay.momenta
    for rows in gradients[70:]:
        found = second.step(rows)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(found, name).nan_to_num(), value.nan_to_num()), name


def test_another_world_size_begins_anew() -> None:
    memory, fresh = ConsensusMemory(), ConsensusMemory()
    assert memory.state_dict() == {"cosines": None}
    memory.load_state_dict(memory.state_dict())
    for world_size in (4, 3):
        gramian, voters = gramian_of(outliers(world_size)), torch.ones(world_size, dtype=torch.bool)
        found = memory.decide(gramian, gramian, voters)
    expected = fresh.decide(gramian, gramian, voters)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_count_nowhere_are_left_out_and_others_stay_to_the_bit(dtype: torch.dtype) -> None:
    momenta, moves = torch.randn(4, 1000, dtype=dtype), torch.eye(4, dtype=torch.float64)
    moves[2] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    bad = momenta.clone()
    bad[2] = torch.nan
    moved = move(bad, moves)
    assert torch.equal(moved[[0, 1, 3]], momenta[[0, 1, 3]])
    torch.testing.assert_close(moved[2], momenta[:2].mean(0))
    assert moved.dtype == dtype


def test_slices_are_moved_alike() -> None:
    momenta, moves = torch.randn(3, 50), torch.rand(3, 3).double()
    torch.testing.assert_close(
        move(momenta, moves), torch.cat([move(momenta[:, :20], moves), move(momenta[:, 20:], moves)], 1)
    )


def test_sketches_are_judged_as_the_gradients_are() -> None:
    gradients = training(4, 40, size=20_000)
    gradients[:, 1] = 2 * training(1, 40, size=20_000, seed=7)[:, 0]
    sketches = torch.stack([torch.stack([fold(g, 1024, seed=0)[0] for g in rows]) for rows in gradients])
    exact, sketched = Ranks(4, 20_000), Ranks(4, 1024)
    for rows, folded in zip(gradients, sketches, strict=True):
        expected, found = exact.step(rows), sketched.step(folded)
        torch.testing.assert_close(found.z, expected.z, rtol=0.15, atol=0)  # a distance's error is 1/√(2k): 2 %
    assert torch.equal(found.weights, expected.weights)
    assert found.weights[1] == 0
