"""Where ranks stand: against a reading step by step, whenever it is read."""

import json
import math
import random

import pytest
import torch

from gaf_ddp.monitor.history import History
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.weighting import Mean
from tests.monitor.decisions import Standing, Steps, made, random_steps


def told_one_by_one(steps: Steps, rank: int) -> dict[str, float | None]:
    """Return what a report must say of a rank, from a reading step by step in plain numbers."""
    first_out, out_since, longest_out = None, None, 0
    counts = dict.fromkeys(("nonfinite", "overlong", "zero", "flipped", "finished"), 0)
    kept = present = 0
    points = []
    for step, decisions in steps.items():
        there = [not (each.finished is not None and bool(each.finished[rank])) for each in decisions]
        anything = any(bool(each.kept.any()) for each in decisions)
        if any(there) and anything and 2 * sum(bool(each.kept[rank]) for each in decisions) < len(decisions):
            out_since = step if out_since is None else out_since
            first_out = step if first_out is None else first_out
            longest_out = max(longest_out, step - out_since + 1)
        else:
            out_since = None
        for each, is_there in zip(decisions, there, strict=True):
            counts["finished"] += not is_there
            present += is_there
            kept += is_there and bool(each.kept[rank])
            counts["nonfinite"] += bool(each.nonfinite[rank])
            counts["overlong"] += bool(each.overlong[rank])
            counts["flipped"] += each.flipped is not None and bool(each.flipped[rank])
            counts["zero"] += is_there and not (each.voters | each.nonfinite | each.overlong)[rank]
            z = math.nan if each.distance is None else float(each.distance[rank])
            points += [] if math.isnan(z) else [(step, min(z, 100.0))]
    verdicts: dict[str, float | None] = dict.fromkeys(("trusted_since", "condemned_since"))  # random ones have none
    absence = {"first_out": first_out, "out_since": out_since, "longest_out": longest_out}
    weights = [0.99 ** (max(steps) - step) for step, _ in points]
    total = sum(weights)
    mean_step = sum(w * step for w, (step, _) in zip(weights, points, strict=True)) / total
    mean_z = sum(w * z for w, (_, z) in zip(weights, points, strict=True)) / total
    spread = sum(w * (step - mean_step) ** 2 for w, (step, _) in zip(weights, points, strict=True))
    slope = sum(w * (step - mean_step) * (z - mean_z) for w, (step, z) in zip(weights, points, strict=True)) / spread
    line = {"distance": mean_z, "trend": 100 * slope}
    return {"kept": kept / present if present else None, **counts, **absence, **verdicts, **line}


@pytest.mark.parametrize("world_size", [2, 5, 40])
def test_equals_a_reading_step_by_step_whenever_it_is_read(world_size: int) -> None:
    steps = random_steps(world_size, 200, world_size)
    at_the_end, read_often, resumed = Standing(), Standing(), Standing()
    dice = random.Random(0)
    for step, decisions in steps.items():
        for each in (at_the_end, read_often, resumed):
            each.add(step, decisions)
        if dice.random() < 0.1:
            read_often.report(step + 1, [])
            saved, resumed.history = json.dumps(resumed.history.read()), History()
            resumed.history.load(json.loads(saved))
    last = max(steps) + 1
    for standing in (at_the_end, read_often, resumed):
        report = standing.report(last, [])
        assert (report.step, report.decisions) == (last, sum(map(len, steps.values())))
        for rank, found in enumerate(report.as_dict()["ranks"]):
            assert (found.pop("rank"), found.pop("host")) == (rank, "")
            expected = told_one_by_one(steps, rank)
            assert [name for name in found if found[name] is None] == [n for n in found if expected[n] is None]
            known = {name: value for name, value in found.items() if value is not None}
            assert known == pytest.approx({name: expected[name] for name in known}, rel=1e-6)


def test_gaps_count_in_streaks_and_rules_without_a_distance_have_none() -> None:
    standing = Standing()
    for step in (4, 5, 9):
        standing.add(step, [made([True, False], overlong=[False, True])])
    first, second = standing.report(10, ["a", "b"]).ranks
    assert (first.first_out, first.out_since, first.longest_out) == (None, None, 0)
    assert (second.first_out, second.out_since, second.longest_out) == (4, 4, 6)
    assert (second.distance, second.trend, second.overlong) == (None, None, 3)
    assert str(second) == "rank 1 on b: kept 0 %, norm far over the median 3 times, out since step 4"
    assert second.line(10.0) == "rank 1 on b: kept 0 %, norm over 10 medians 3 times, out since step 4"


def test_a_step_on_which_nothing_agreed_is_nobody_s_absence_and_ends_one() -> None:
    standing = Standing()
    for step in range(4):
        standing.add(step, [made([step < 3, False])])
    first, second = standing.report(4, []).ranks
    assert (first.first_out, first.out_since) == (None, None)
    assert (second.first_out, second.out_since, second.longest_out) == (0, None, 3)


def test_who_has_finished_is_not_absent() -> None:
    standing = Standing()
    for step in range(8):
        standing.add(step, [made([True, step < 4], finished=[False, step >= 4])])
    report = standing.report(8, [])
    assert (report.ranks[1].first_out, report.ranks[1].kept, report.ranks[1].zero) == (None, 1.0, 0)
    assert str(report) == "step 8, 8 decisions, 2 ranks: all are kept"
    assert str(report.ranks[1]) == "rank 1: kept 100 %, finished 4 times"
    alone = Standing()
    alone.add(0, [made([True, False], finished=[False, True])])
    assert str(alone.report(1, [])) == "step 1, 1 decision, 2 ranks: all are kept"
    assert str(alone.report(1, []).ranks[1]) == "rank 1: finished from the start"


def test_starts_anew_with_another_world_size() -> None:
    standing = Standing()
    for world_size in (4, 3, 5):
        for step in range(70):
            standing.add(step, [decide(torch.ones(world_size, world_size), Mean(), None)])
        report = standing.report(70, ["host"] * 9)
        assert (report.decisions, len(report.ranks)) == (70, world_size)
        assert {rank.host for rank in report.ranks} == {""}  # of other ranks


def test_a_trend_needs_steps_and_is_the_slope() -> None:
    standing = Standing()
    for step in range(300):
        standing.add(step, [made([True] * 2, [1 + step / 50, math.nan])])
        if step == 20:
            assert standing.report(21, []).ranks[0].trend is None
    first, second = standing.report(300, []).ranks
    assert first.trend == pytest.approx(2.0)
    assert first.distance is not None
    assert 5 < first.distance < 7  # the last value is 6.98, of steps that end there
    assert (second.distance, second.trend) == (None, None)


@pytest.mark.parametrize("name", ["first_out", "last", "judged"])
def test_what_is_no_history_is_refused_and_changes_nothing(name: str) -> None:
    history = History()
    history.add(3, [made([True, False], [1.0, 2.0])])
    before = history.read()
    for wrong in (None, {}, {**before, name: []}, {**before, name: [math.inf] * len(before[name])}):
        with pytest.raises(ValueError, match=r"history must hold lists of finite numbers as state_dict\(\) returns"):
            history.load(wrong)
    assert history.read() == before
