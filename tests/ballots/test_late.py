"""The late way under DDP: who counts, and to the bit what comes back."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import ConsensusAgreement, GAFState, gaf_hook
from gaf_ddp.ballots.late import LateFilter
from tests.ballots.training import SIZES, TINY, N, averaged, both, train
from tests.gradients import agreeing_gradients
from tests.nets import Probe, assert_replicas_equal, ddp, flat_gradients

Ranks = Callable[..., list[Any]]


def alike(world_size: int, steps: int) -> Tensor:
    """Return gradients `(steps, W, N)` of ranks that are alike."""
    return torch.stack([agreeing_gradients(world_size, N, seed) for seed in range(steps)])


OPTIONS: list[dict[str, Any]] = [TINY, {}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]


@pytest.mark.parametrize("options", [*OPTIONS, {**TINY, "static_graph": True}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_where_all_count_it_is_torchs_average_to_the_bit(
    ranks: Ranks, world_size: int, options: dict[str, Any]
) -> None:
    for trained, plain in ranks(world_size, both, alike(world_size, 6), {}, options):
        assert trained.kept.all()
        assert torch.equal(trained.gradients, plain)


@pytest.mark.parametrize("settings", [{}, {"weighting": ConsensusAgreement(2.5)}, {"judge_every": 3}], ids=str)
@pytest.mark.parametrize("bad", [0, 2])
def test_a_bad_rank_is_left_out_and_the_others_averaged(ranks: Ranks, bad: int, settings: dict[str, Any]) -> None:
    gradients = alike(4, 30)
    gradients[:, bad] *= -1
    others = [rank for rank in range(4) if rank != bad]
    for trained in ranks(4, train, gradients, settings):
        kept_before = torch.cat([torch.ones(1, 4, dtype=torch.bool), trained.kept[:-1]])
        assert not trained.kept[10:, bad].any()
        assert trained.kept[:, others].all()
        for step, kept in enumerate(kept_before):
            expected = gradients[step, kept].double().mean(0)
            assert (trained.gradients[step] - expected).norm() < 1e-6 * expected.norm()
        assert trained.summary[f"gaf/kept_rank_{bad:02d}"] < 0.35


def test_its_verdict_is_one_step_late(ranks: Ranks) -> None:
    gradients = alike(3, 2)
    gradients[:, 1] *= -1
    for trained in ranks(3, train, gradients, {}):
        oracle = gradients[0].double().mean(0)
        assert (trained.gradients[0] - oracle).norm() < 1e-6 * oracle.norm()
        assert trained.kept[0].tolist() == [True, False, True]
        oracle = gradients[1, ::2].double().mean(0)
        assert (trained.gradients[1] - oracle).norm() < 1e-6 * oracle.norm()


def force_unlike_verdicts(state: GAFState, step: int) -> None:
    """Let every rank believe something else of who counts."""
    if step == 2:
        late, rank = state._way, dist.get_rank()
        state._catch_up()
        assert isinstance(late, LateFilter)
        late.share.set(torch.tensor([True, rank != 1, rank == 0, True]))


def test_unlike_verdicts_are_a_wrong_record_and_never_unequal_parameters(ranks: Ranks) -> None:
    gradients = alike(4, 5)
    outcomes = ranks(4, train, gradients, {}, TINY, force_unlike_verdicts)  # compares the replicas
    # Rank 0 counts 4 ranks; rank 1 itself out; rank 2 itself out; rank 3 three.
    shares = torch.tensor([1 / 4, 0, 0, 1 / 3], dtype=torch.float64)
    expected = (shares[:, None] * gradients[2].double()).sum(0) / shares.sum()
    for trained in outcomes:
        assert torch.equal(trained.gradients, outcomes[0].gradients)
        assert (trained.gradients[2] - expected).norm() < 1e-6 * expected.norm()


def count_what_is_opened(device: torch.device) -> list[int]:
    """Return how many threads and groups there are, before and after some steps."""
    model = ddp(Probe(SIZES), device, **TINY)
    model(torch.ones(N, device=device)).backward()
    before = [threading.active_count(), len(dist.distributed_c10d._world.pg_map)]
    model.register_comm_hook(GAFState(), gaf_hook)
    for _ in range(3):
        model(torch.ones(N, device=device)).backward()
    return [*before, threading.active_count(), len(dist.distributed_c10d._world.pg_map)]


def test_it_opens_no_thread_and_no_group(ranks: Ranks) -> None:
    for threads, groups, threads_after, groups_after in ranks(2, count_what_is_opened):
        assert (threads, groups) == (threads_after, groups_after)


def watch_from_step_4_on(state: GAFState, step: int) -> None:
    state.watch = 4 <= step < 7


def test_watching_is_torchs_average_to_the_bit_and_may_be_assigned(ranks: Ranks) -> None:
    gradients = alike(4, 10)
    gradients[:, 3] *= -1
    gradients[5, 0, 3] = torch.nan  # passes, as with torch's hook
    plain = ranks(4, averaged, gradients)[0]
    for trained in ranks(4, train, gradients, {}, TINY, watch_from_step_4_on):
        assert torch.equal(trained.gradients[4:7].nan_to_num(9), plain[4:7].nan_to_num(9))
        assert not trained.kept[2:, 3].any()  # judged all the same
        expected = gradients[8, :3].double().mean(0)
        assert (trained.gradients[8] - expected).norm() < 1e-6 * expected.norm()


def test_before_start_step_everyone_counts(ranks: Ranks) -> None:
    gradients = alike(3, 8)
    gradients[:, 0] *= -1
    plain = ranks(3, averaged, gradients)[0]
    for trained in ranks(3, train, gradients, {"start_step": 5}):
        assert torch.equal(trained.gradients[:5], plain[:5])
        expected = gradients[5, 1:].double().mean(0)
        assert (trained.gradients[5] - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(("wire", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_gradients_may_travel_in_half_precision(ranks: Ranks, wire: torch.dtype, tolerance: float) -> None:
    gradients = alike(3, 4)
    gradients[:, 1] *= -1
    for trained in ranks(3, train, gradients, {"wire_dtype": wire}):
        for step, kept in enumerate([[0, 1, 2], [0, 2], [0, 2], [0, 2]]):
            expected = gradients[step, kept].double().mean(0)
            assert (trained.gradients[step] - expected).norm() < tolerance * expected.norm()


def judge_with_tau(device: torch.device) -> list[list[bool]]:
    """Return whom a rule with tau would keep, watched."""
    model, state = ddp(Probe(SIZES), device, **TINY), GAFState(tau=0.9, watch=True)
    model.register_comm_hook(state, gaf_hook)
    kept = []
    for of_ranks in torch.stack([agreeing_gradients(4, N, seed) for seed in range(3)]):
        model(of_ranks[dist.get_rank()] * (-1 if dist.get_rank() == 2 else 1)).backward()
        assert state.agreement is not None
        kept.append(state.agreement.kept.tolist())
    state.watch = False  # from here on it filters, at once
    model.zero_grad()
    gradients = agreeing_gradients(4, N, 9)
    model(gradients[dist.get_rank()] * (-1 if dist.get_rank() == 2 else 1)).backward()
    expected = gradients[[0, 1, 3]].double().mean(0)
    assert (flat_gradients(model) - expected).norm() < 1e-5 * expected.norm()
    assert_replicas_equal(model)
    return kept


def test_other_rules_may_watch_too_and_filter_later(gloo_ranks: Ranks) -> None:
    for kept in gloo_ranks(4, judge_with_tau):
        assert kept == [[True, True, False, True]] * 3
