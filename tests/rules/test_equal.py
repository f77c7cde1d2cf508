"""Ranks whose gradients are equal for steps in a row: found, named, and one voter together."""

import logging

import pytest
import torch

from gaf_ddp.ballots.voters import Voters
from gaf_ddp.monitor.statistics import Statistics
from tests.monitor.test_noise import Late
from tests.rules.ballots import ByJudge, training


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_are_equal_after_ten_steps_in_a_row_and_until_they_differ(world_size: int) -> None:
    gradients, judge = training(world_size, 30), ByJudge(world_size)
    gradients[3:20, -1] = gradients[3:20, 0]
    expected = torch.zeros(world_size, world_size, dtype=torch.bool)
    expected[0, -1] = expected[-1, 0] = True
    for step, rows in enumerate(gradients):
        equal = judge.step(rows).equal
        assert torch.equal(equal, expected if 12 <= step < 20 else torch.zeros_like(expected)), step


def test_ballots_of_several_steps_count_as_many_times_and_rounding_is_no_difference() -> None:
    gradients, judge = training(4, 6), ByJudge(4)
    gradients[:, 2] = gradients[:, 1] * (1 + 1e-8)
    found = [bool(judge.step(rows, steps=4).equal[1, 2]) for rows in gradients]
    assert found == [False, False, True, True, True, True]
    gradients[:, 2] = gradients[:, 1] + 1e-4 * gradients[:, 3]
    assert not any(bool(ByJudge(4).step(rows, steps=4).equal.any()) for rows in gradients)


def test_copies_of_one_rank_cannot_outvote_the_others() -> None:
    """Of eight ranks, three send what a fourth does: together they would be the consensus."""
    gradients = training(8, 200, common=0.2)
    gradients[:, [1, 4, 6]] = gradients[:, [0]]
    judge = ByJudge(8)
    kept = torch.stack([judge.step(rows).kept for rows in gradients])
    assert kept[20:].double().mean() > 0.98


def test_they_are_named_once_by_one_rank(caplog: pytest.LogCaptureFixture) -> None:
    gradients, late = training(4, 200, size=256), Late(Voters([0, 1, 2, 3]))
    gradients[:, 3] = gradients[:, 1]
    statistics, silent = Statistics(), Statistics()
    statistics.hosts, silent.speaks = ["a", "a", "b", "b 1"], False
    with caplog.at_level(logging.WARNING):
        for step, rows in enumerate(gradients):
            decision = late(rows[None])
            for each in (statistics, silent):
                each.record(step, [decision], None)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "equal gradients for ten steps in a row: rank 1 (a) and rank 3 (b). Do they read the same data" in said


def test_all_equal_are_all_kept() -> None:
    gradients, judge = training(5, 40), ByJudge(5)
    gradients[:] = gradients[:, :1]
    assert all(bool(judge.step(rows).kept.all()) for rows in gradients)
