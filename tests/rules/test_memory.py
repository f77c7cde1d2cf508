"""The rule with its memory, and the judge of ballots, against explicit vectors in float64."""

import random

import pytest
import torch
from torch import Tensor

from gaf_ddp.rules.consensus import distances
from gaf_ddp.rules.memory import ConsensusMemory, find_flipped
from tests.gradients import agreeing_gradients
from tests.marks import job_but
from tests.properties import gramian_of
from tests.rules.ballots import SCENARIOS, ByJudge, ByMemory, training
from tests.rules.consensus_oracle import ConsensusOracle

WORLD_SIZES = (1, 2, 3, 7)
STEPS = {"every step": (1,), "every third": (3,), "changing": (1, 2, 3, 8)}  # of a ballot


def drawn(steps: str, count: int) -> list[int]:
    """Return how many steps each ballot has."""
    chance = random.Random(count)
    return [chance.choice(STEPS[steps]) for _ in range(count)]


def where(flags: Tensor) -> list[int]:
    found: list[int] = flags.nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize("steps", job_but("changing", of=STEPS))
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_memory_is_that_of_explicit_vectors(world_size: int, scenario: str, steps: str) -> None:
    gradients = SCENARIOS[scenario](training(world_size, 64), world_size - 1)
    by_hand, ranks = ConsensusOracle(world_size, 40), ByMemory(world_size, 40)
    for step, (rows, count) in enumerate(zip(gradients, drawn(steps, 64), strict=True)):
        expected, found = by_hand.step(rows, count), ranks.step(rows, count)
        assert where(found.flipped) == expected.flipped, f"step {step}"
        z = torch.tensor(expected.z).double()
        torch.testing.assert_close(found.z, z, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(ranks.momenta, by_hand.momenta - by_hand.mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", job_but("changing", of=STEPS))
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_judge_is_that_of_explicit_vectors(world_size: int, scenario: str, steps: str) -> None:
    gradients = SCENARIOS[scenario](training(world_size, 64, seed=1), world_size - 1)
    by_hand, ranks = ConsensusOracle(world_size, 40, margin=1e-5), ByJudge(world_size)
    for step, (rows, count) in enumerate(zip(gradients, drawn(steps, 64), strict=True)):
        expected, found = by_hand.step(rows, count), ranks.step(rows, count)
        assert where(found.kept) == expected.kept, f"step {step}"
        assert where(found.flipped) == expected.flipped, f"step {step}"
        z = torch.tensor(expected.z).double()
        torch.testing.assert_close(found.z, z, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("world_size", job_but(5, of=(3, 4, 5, 6, 9, 16)))
@pytest.mark.parametrize("seed", range(4))
def test_random_mishaps_are_judged_as_explicit_vectors_are(world_size: int, seed: int) -> None:
    chance = random.Random(f"{world_size} {seed}")
    gradients = training(world_size, 40, chance.choice([0.1, 0.5, 3.0]), seed=seed)
    for _ in range(6):
        scenario, rank = chance.choice(list(SCENARIOS)), chance.randrange(1, world_size)
        if scenario not in ("nearly copies", "coming and going"):
            begin = chance.randrange(30)
            gradients[begin:] = SCENARIOS[scenario](gradients.clone(), rank)[begin:]
    by_hand, ranks = ConsensusOracle(world_size, 40), ByMemory(world_size, 40)
    for rows in gradients:
        count = chance.choice([1, 2, 5])
        expected, found = by_hand.step(rows, count), ranks.step(rows, count)
        assert where(found.flipped) == expected.flipped
        z = torch.tensor(expected.z).double()
        torch.testing.assert_close(found.z, z, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_momentum_that_is_not_finite_becomes_the_mean() -> None:
    vectors = agreeing_gradients(4, 30).double()
    vectors[1] = torch.inf
    gramian, voters = gramian_of(vectors), torch.tensor([True, False, True, True])
    found = ConsensusMemory().judge(gramian, torch.zeros(4, 4).double(), voters)
    assert found.z.isnan().tolist() == [False, True, False, False]
    assert not found.moves[:, 1].any()
    assert found.moves.sum(1).abs().max() < 1e-12  # mean-free, the new one too
    moved = found.moves[:, [0, 2, 3]] @ vectors[[0, 2, 3]]
    mean = vectors[distances(gramian, voters)[1]].mean(0)
    torch.testing.assert_close(moved[[0, 2, 3]], vectors[[0, 2, 3]] - mean)
    torch.testing.assert_close(moved[1], torch.zeros(30).double())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_flipped_ranks_are_those_whose_mirror_image_would_be_a_member(world_size: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        bad = torch.rand(world_size, generator=generator) < 0.2
        bad &= bad.sum() * 2 < world_size
        signs = 1 - 2 * bad.double()
        similarity = signs[:, None] * signs * (0.3 + 0.05 * torch.rand(world_size, world_size, generator=generator))
        found = find_flipped(similarity, torch.ones(world_size, dtype=torch.bool))
        assert torch.equal(found, bad & (bad.sum() <= (world_size - 1) // 2))


def test_a_pair_counts_from_its_own_50th_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []

    def find_nobody(similarity: Tensor, voters: Tensor) -> Tensor:
        asked.append(similarity)
        return torch.zeros_like(voters)

    monkeypatch.setattr("gaf_ddp.rules.memory.find_flipped", find_nobody)
    for steps, first in ((1, {(0, 1): 49, (0, 2): 59}), (3, {(0, 1): 16, (0, 2): 26})):
        asked.clear()
        gradients = training(3, 70)
        gradients[10:20, 2] = 0
        ranks = ByMemory(3, 40)
        for rows in gradients:
            ranks.step(rows, steps)
        assert {pair: next(s for s, m in enumerate(asked) if m[pair]) for pair in first} == first


def test_another_world_size_begins_anew() -> None:
    memory, fresh = ConsensusMemory(), ConsensusMemory()
    for world_size in (4, 3):
        gramian, voters = gramian_of(agreeing_gradients(world_size, 30)), torch.ones(world_size, dtype=torch.bool)
        found = memory.judge(gramian, gramian, voters)
    expected = fresh.judge(gramian, gramian, voters)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
