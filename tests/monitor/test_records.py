"""Records of one state: read at once on the CPU, a step later on accelerators, where what is wrong is raised then."""

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gaf_ddp import Mean
from gaf_ddp.monitor.records import Decision, Records
from gaf_ddp.rules.agreement import decide
from gaf_ddp.runtime import device as devices

FINE = decide(torch.ones(4, 4), Mean(), None)
ALIKE = torch.full((4,), 7.0, dtype=torch.float64)
UNLIKE = torch.tensor([7.0, 8.0, 7.0, 7.0], dtype=torch.float64)


def add(records: Records, step: int, *numbers: Tensor, weight: float | None = None, limit: int | None = None) -> None:
    """Add a step of two decisions, one with this weight."""
    fine = Decision(FINE, [])
    bad = fine if weight is None else Decision(decide(torch.ones(4, 4), _weighs(weight), None), [])
    records.add(step, [bad, fine], list(numbers) or [ALIKE] * 4, limit)


def _weighs(weight: float) -> Callable[[Tensor], Tensor]:
    return lambda gramian: torch.full_like(gramian[0], weight)


def count(records: Records) -> int:
    """Return how many decisions are in the statistics."""
    return int(sum(records.statistics.sums()["decisions"]))


def test_on_the_cpu_are_read_at_once() -> None:
    records = Records()
    add(records, 0)
    assert count(records) == 2
    assert [each.agreement for each in records.decisions] == [FINE, FINE]


class TestOnAccelerators:
    @pytest.fixture(autouse=True)
    def pass_for_an_accelerator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "_HOST", "no device")

    def test_are_read_a_step_later_or_when_asked(self) -> None:
        records = Records()
        for step in range(3):
            add(records, step)
            assert count(records) == 2 * step
            assert [each.agreement for each in records.decisions] == [FINE, FINE]  # the last step's, on the device
        records.read(None)
        assert count(records) == 6
        records.read(None)
        assert count(records) == 6

    @pytest.mark.parametrize("weight", [math.nan, math.inf, -0.5])
    def test_weights_that_are_none_are_told_a_step_later(self, weight: float) -> None:
        records = Records()
        add(records, 0, weight=weight)
        with pytest.raises(ValueError, match="weighting must return finite weights >= 0, found others in 1 decision"):
            add(records, 1)
        records.read(None)  # the error is told once
        assert count(records) == 2

    def test_unlike_settings_are_told_a_step_later(self) -> None:
        records = Records()
        add(records, 0, ALIKE, UNLIKE)
        with pytest.raises(ValueError, match=r"settings and weights must be the same on .* than rank 0's on ranks 1"):
            add(records, 1)

    def test_too_many_skips_are_told_a_step_later(self) -> None:
        records, nothing = Records(), decide(torch.full((4, 4), math.nan), Mean(), None)
        records.add(0, [Decision(nothing, [])], [ALIKE], 0)
        with pytest.raises(RuntimeError, match="max_consecutive_skips is 0, found 1 steps in a row"):
            records.read(0)

    def test_what_is_on_its_way_stays_out_of_a_copy(self) -> None:
        records = Records()
        for step in range(2):
            add(records, step)
        copy = pickle.loads(pickle.dumps(records))
        copy.read(None)
        assert (count(copy), copy.decisions, copy.followers) == (2, [], [])


def test_on_the_cpu_unlike_settings_are_told_at_once() -> None:
    records = Records()
    with pytest.raises(ValueError, match="settings and weights must be the same on every rank"):
        add(records, 0, ALIKE, UNLIKE)
    add(records, 1)
    assert count(records) == 2


def test_nobody_blames_the_weighting_where_nobody_votes() -> None:
    records = Records()
    records.add(0, [Decision(decide(torch.full((4, 4), math.nan), Mean(), None), [])], [ALIKE], None)
    assert records.statistics.summary(1, reset=True)["gaf/nonfinite_fraction"] == 1


def test_followers_are_told_every_step_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_HOST", "no device")
    records, seen = Records(), list[int]()
    records.followers.append(lambda decided: seen.append(len(decided)))
    add(records, 0)
    records.add(1, [], [], None)
    assert seen == [2, 0]
