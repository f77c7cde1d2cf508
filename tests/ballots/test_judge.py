"""What the judge of ballots does to bursts, absences and turned signs, its properties, and what it saves."""

import math

import pytest
import torch
from torch import Tensor

from gaf_ddp.ballots.judge import Judge
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.rules.memory import MOMENTUM
from tests.rules.ballots import ByJudge, burst, coming_and_going, training
from tests.syncs import HostSyncs


@pytest.mark.parametrize("factor", [1000.0, -10.0])
def test_a_burst_is_out_at_once_and_over_a_horizon_later(factor: float) -> None:
    kept = ByJudge(4).kept(burst(training(4, 300), 2, factor), 2)
    assert all(kept[:20])
    assert not any(kept[22:50])
    assert all(kept[150:])


def test_a_rank_that_is_absent_stays_what_it_was() -> None:
    good = ByJudge(4).kept(burst(training(4, 100), 2, math.nan), 2)
    assert all(good)  # its gradients are left out by themselves
    bad = training(4, 200)
    bad[:, 1] = training(1, 200, seed=7)[:, 0] * 2
    bad[100:130, 1] = 0
    assert not any(ByJudge(4).kept(bad, 1)[90:])


@pytest.mark.parametrize("away", [1, 10, 150])
@pytest.mark.parametrize("common", [0.5, 3.0])
def test_an_honest_rank_that_comes_back_is_kept(common: float, away: int) -> None:
    gradients = training(4, 300, common)
    gradients[100 : 100 + away, 1] = 0
    assert all(ByJudge(4).kept(gradients, 1))


def test_a_turned_sign_that_momenta_do_not_show_is_found_after_50_steps() -> None:
    gradients = training(6, 150)
    gradients[1::2] -= 2 * (gradients - training(6, 150, common=0))[1::2]  # the common part turns at every step
    gradients[:, 3] *= -1
    ranks = ByJudge(6)
    found = [ranks.step(rows) for rows in gradients]
    assert not any(f.flipped.any() for f in found[:49])
    assert all(f.flipped.tolist() == [i == 3 for i in range(6)] for f in found[60:])
    assert all((f.z < 3).all() for f in found[60:])
    assert not any(f.kept[3] for f in found[60:])


def test_where_nobody_would_count_the_last_verdict_stays() -> None:
    gradients = training(3, 30)
    gradients[:, 0] = 2 * training(1, 30, seed=7)[:, 0]
    ranks = ByJudge(3)
    assert not ranks.kept(gradients, 0)[-1]
    alone = torch.where(torch.arange(3)[:, None] == 0, gradients[-1], 0)  # only the bad one has a gradient
    assert ranks.step(alone).kept.tolist() == [True, True, True]  # z is 0, nobody is there to be compared with
    assert ranks.step(torch.zeros(3, 40)).kept.tolist() == [True, True, True]


def opinions(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return who is kept `(S, W)` and z `(S, W)`."""
    ranks = ByJudge(gradients.shape[1])
    found = [ranks.step(rows) for rows in gradients]
    return torch.stack([f.kept for f in found]), torch.stack([f.z for f in found])


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_opinions_follow_a_permutation_and_ignore_the_scale(world_size: int) -> None:
    gradients = coming_and_going(training(world_size, 80), world_size)
    order = torch.randperm(world_size, generator=torch.Generator().manual_seed(0))
    kept, z = opinions(gradients)
    permuted = opinions(gradients[:, order])
    assert torch.equal(permuted[0], kept[:, order])
    torch.testing.assert_close(permuted[1], z[:, order], rtol=1e-4, atol=1e-4, equal_nan=True)
    for factor in (2.0**-60, 2.0**60):
        scaled = opinions(gradients * factor)
        assert torch.equal(scaled[0], kept)
        torch.testing.assert_close(scaled[1], z, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_copies_are_judged_alike() -> None:
    gradients = training(7, 80)
    gradients[:, 1] = 2 * training(1, 80, seed=7)[:, 0]
    gradients[:, 4] = gradients[:, 1]
    gradients[:, 6] = gradients[:, 3]
    kept, z = opinions(gradients)
    assert torch.equal(kept[:, 1], kept[:, 4])
    assert torch.equal(kept[:, 3], kept[:, 6])
    torch.testing.assert_close(z[40:, 1], z[40:, 4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z[:, 3], z[:, 6], rtol=0.3, atol=0)  # rounding alone makes one of them a member
    assert not kept[-1, 1]
    assert kept[-1, 3]


def test_sketches_are_judged_as_the_gradients_are() -> None:
    gradients = training(4, 40, size=20_000)
    gradients[:, 1] = 2 * training(1, 40, size=20_000, seed=7)[:, 0]
    sketches = torch.stack([torch.stack([fold(g, whole(20_000), 1024)[0] for g in rows]) for rows in gradients])
    (kept, z), (found, by_sketch) = opinions(gradients), opinions(sketches)
    torch.testing.assert_close(by_sketch, z, rtol=0.15, atol=0)  # a distance's error is 1/√(2k): 2 %
    assert torch.equal(found[5:], kept[5:])
    assert not kept[-1, 1]


def test_the_tally_never_waits_for_the_device() -> None:
    ranks = ByJudge(4)
    gradients = coming_and_going(training(4, 6), 3)
    for rows in gradients:
        clean = rows.nan_to_num(0.0)
        with HostSyncs() as syncs:
            products = ranks.judge.tally(clean, 1)
        assert syncs.calls == []
        ranks.judge.judge(products, clean.any(1), 1)


def test_what_overflows_is_out_of_it_for_a_ballot() -> None:
    gradients = training(4, 60)
    gradients[30:32, 2] = 3e38 / 40**0.5
    kept, z = opinions(gradients)
    assert z[:30].isfinite().all()
    assert z[33:].isfinite().all()
    assert kept[-1].all() | (z[-1] < 5.01).all()


@pytest.mark.parametrize("has_references", [False, True])
def test_what_is_remembered_can_be_saved(has_references: bool) -> None:
    gradients = coming_and_going(training(4, 120), 3)
    shares = [training(4, 2, seed=9).transpose(0, 1) if has_references and s % 9 == 0 else None for s in range(120)]
    whole_run, first, second = ByJudge(4), ByJudge(4), ByJudge(4)
    expected = [whole_run.step(rows, 1, share) for rows, share in zip(gradients, shares, strict=True)][-1]
    for rows, share in zip(gradients[:70], shares, strict=False):
        first.step(rows, 1, share)
    saved = first.judge.dump()
    first.step(gradients[70])  # what was saved stays as it was
    second.judge.load(saved)
    for rows, share in zip(gradients[70:], shares[70:], strict=True):
        found = second.step(rows, 1, share)
    assert (found.by_held_out is not None) == has_references
    for name, value in expected._asdict().items():
        if value is not None:
            assert torch.equal(getattr(found, name).nan_to_num(), value.nan_to_num()), name


def test_another_world_size_begins_anew_and_nonsense_is_refused() -> None:
    judge = Judge(3.0, MOMENTUM)
    for world_size in (4, 3):
        rows, voters = training(world_size, 1)[0], torch.ones(world_size, dtype=torch.bool)
        found = judge.judge(judge.tally(rows, 1), voters, 1)
    expected = ByJudge(3).step(training(3, 1)[0])
    pairs = zip(found[:-1], expected[:-1], strict=True)  # without held-out data there is no verdict by it
    assert all(torch.equal(left, right) for left, right in pairs if left is not None and right is not None)
    assert found.by_held_out is expected.by_held_out is None
    before = judge.dump()
    with pytest.raises(ValueError, match="memory"):
        judge.load(b"nonsense")
    assert judge.dump() == before
