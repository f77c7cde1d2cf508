"""Where ranks stand: against a reading step by step, in the state, on real ranks, and what is said of it."""

import json
import math
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import Agreement, GAFState, device, gaf_hook
from gaf_ddp.exchange.pipeline import Decision
from gaf_ddp.monitor.history import Standing
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.weighting import Mean
from tests.accelerator import take_accelerators_way
from tests.nets import Probe, ddp
from tests.syncs import HostSyncs

Ranks = Callable[..., list[Any]]
Steps = dict[int, list[Agreement]]


def made(
    kept: list[bool], nonfinite: list[bool], overlong: list[bool], z: list[float] | None, flipped: list[bool]
) -> Agreement:
    """Return a record of which `Standing` reads only these; who is kept votes, who is none of them is zero."""
    plain = decide(torch.eye(len(kept)), Mean(), None)
    flags = {"kept": kept, "voters": kept, "nonfinite": nonfinite, "overlong": overlong}
    found = {name: torch.tensor(flag) for name, flag in flags.items()}
    if z is None:
        return replace(plain, **found)
    return replace(plain, **found, distance=torch.tensor(z).double(), flipped=torch.tensor(flipped))


def random_steps(world_size: int, count: int, seed: int) -> Steps:
    """Return steps' decisions: streaks, gaps between steps, one to three decisions in each, z unknown at times."""
    dice = random.Random(seed)
    habits = [0.02] * world_size  # how readily a rank changes sides
    sides, steps, step = [True] * world_size, {}, 3
    for _ in range(count):
        step += 1 if dice.random() < 0.95 else 5
        sides = [side != (dice.random() < habit) for side, habit in zip(sides, habits, strict=True)]
        decisions = []
        for _ in range(dice.choice([1, 3, 3, 3])):
            kept = [side == (dice.random() < 0.9) for side in sides]
            nonfinite = [not k and dice.random() < 0.3 for k in kept]
            overlong = [not k and not n and dice.random() < 0.3 for k, n in zip(kept, nonfinite, strict=True)]
            flipped = [dice.random() < 0.1 for _ in kept]
            z = [dice.choice([math.nan, 1.0, 1e20, math.inf, 0.5 + step / 100]) for _ in kept]
            decisions.append(made(kept, nonfinite, overlong, z if dice.random() < 0.9 else None, flipped))
        steps[step] = decisions
    return steps


def told_one_by_one(steps: Steps, rank: int) -> dict[str, Any]:
    """Return what a report must say of a rank, from a reading step by step."""
    decisions = [agreement for each in steps.values() for agreement in each]

    def count(flag: Callable[[Agreement], Tensor]) -> int:
        return sum(bool(flag(agreement)[rank]) for agreement in decisions)

    first_out, out_since, longest_out = None, None, 0
    points = []
    for step, each in steps.items():
        out = 2 * sum(bool(agreement.kept[rank]) for agreement in each) < len(each)
        if out:
            out_since = step if out_since is None else out_since
            first_out = step if first_out is None else first_out
            longest_out = max(longest_out, step - out_since + 1)
        else:
            out_since = None
        known = [float(agreement.distance[rank]) for agreement in each if agreement.distance is not None]
        points += [(step, min(z, 100.0)) for z in known if not math.isnan(z)]
    expected = {
        "kept": count(lambda agreement: agreement.kept) / len(decisions),
        "nonfinite": count(lambda agreement: agreement.nonfinite),
        "overlong": count(lambda agreement: agreement.overlong),
        "zero": count(lambda agreement: ~(agreement.voters | agreement.nonfinite | agreement.overlong)),
        "flipped": count(lambda a: torch.zeros_like(a.kept) if a.flipped is None else a.flipped),
        "first_out": first_out,
        "out_since": out_since,
        "longest_out": longest_out,
    }
    times, z = torch.tensor(points, dtype=torch.float64).T
    weights = 0.99 ** (max(steps) - times)
    mean_z, mean_time = ((weights * values).sum() / weights.sum() for values in (z, times))
    spread = (weights * (times - mean_time) ** 2).sum()
    slope = (weights * (times - mean_time) * (z - mean_z)).sum() / spread
    return {**expected, "distance": mean_z.item(), "trend": 100 * slope.item()}


@pytest.mark.parametrize("world_size", [2, 5, 40])
def test_equals_a_reading_step_by_step_whenever_it_is_read(world_size: int) -> None:
    steps = random_steps(world_size, 200, world_size)
    at_the_end, read_often, resumed = Standing(), Standing(), Standing()
    dice = random.Random(0)
    for step, decisions in steps.items():
        at_the_end.record(step, decisions)
        read_often.record(step, decisions)
        resumed.record(step, decisions)
        if dice.random() < 0.1:
            read_often.report(step + 1, [])
            saved, resumed = json.dumps(resumed.state_dict()), Standing()
            resumed.load_state_dict(json.loads(saved))
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
        standing.record(step, [made([True, False], [False, False], [False, True], None, [])])
    first, second = standing.report(10, ["a", "b"]).ranks
    assert (first.first_out, first.out_since, first.longest_out) == (None, None, 0)
    assert (second.first_out, second.out_since, second.longest_out) == (4, 4, 6)
    assert (second.distance, second.trend, second.overlong) == (None, None, 3)
    assert str(second) == "rank 1 on b: kept 0 %, too long 3 times, out since step 4"


def test_starts_anew_with_another_world_size() -> None:
    standing = Standing()
    for world_size in (4, 3, 5):
        for step in range(70):
            standing.record(step, [decide(torch.ones(world_size, world_size), Mean(), None)])
        report = standing.report(70, ["host"] * 9)
        assert (report.decisions, len(report.ranks)) == (70, world_size)
        assert {rank.host for rank in report.ranks} == {""}  # of other ranks


def test_a_trend_needs_steps_and_is_the_slope() -> None:
    standing = Standing()
    for step in range(300):
        standing.record(step, [made([True] * 2, [False] * 2, [False] * 2, [1 + step / 50, math.nan], [False] * 2)])
        if step == 20:
            assert standing.report(21, []).ranks[0].trend is None
    first, second = standing.report(300, []).ranks
    assert first.trend == pytest.approx(2.0)
    assert first.distance is not None
    assert 5 < first.distance < 7  # the last value is 6.98, of steps that end there
    assert (second.distance, second.trend) == (None, None)


@pytest.mark.parametrize("count", [1, 200])
def test_waits_once_when_read_and_never_when_recording(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_HOST", "no device")
    standing, steps = Standing(), random_steps(4, count, 0)
    with HostSyncs() as syncs:
        for step, decisions in steps.items():
            standing.record(step, decisions)
    assert syncs.calls == []
    with HostSyncs() as syncs:
        standing.report(9999, [])
    assert len(syncs.calls) == 1


class TestReport:
    def test_names_the_ranks_that_matter_and_no_others(self) -> None:
        state = GAFState(tau=1.0)
        assert str(state.report()) == "step 0, 0 decisions, 0 ranks"
        for step in range(100):
            end_step(state, out=[1] if step >= 20 else [], world_size=4)
        lines = str(state.report()).splitlines()
        assert lines[0] == "step 100, 100 decisions, 4 ranks:"
        assert [line.split(":")[0] for line in lines[1:]] == ["  rank 1"]
        assert lines[1].endswith("kept 20 %, zero 80 times, out since step 20")

    def test_of_ranks_that_are_well_is_one_line(self) -> None:
        state = GAFState(tau=1.0)
        for _ in range(3):
            end_step(state, out=[], world_size=4)
        assert str(state.report()) == "step 3, 3 decisions, 4 ranks: all are kept"

    def test_is_not_reset_by_summary_but_saved(self) -> None:
        state = GAFState(tau=1.0)
        for _ in range(5):
            end_step(state, out=[0], world_size=3)
        summary = state.summary()
        assert [summary[f"gaf/out_rank_{rank:02d}"] for rank in range(3)] == [5, 0, 0]
        assert state.report().ranks[0].longest_out == 5
        restored = GAFState()
        restored.load_state_dict(state.state_dict())
        assert restored.report() == state.report()


def end_step(state: GAFState, out: list[int], world_size: int) -> None:
    """End a step in which these ranks' gradients were zero."""
    gramian = torch.ones(world_size, world_size)
    gramian[out], gramian[:, out] = 0.0, 0.0
    agreement = decide(gramian, Mean(), None)
    state._end_step([(Decision(agreement, []), torch.zeros(world_size))])


class TestWarnings:
    def test_one_of_a_rank_that_is_out_for_long_in_a_thousand_steps(self, caplog: pytest.LogCaptureFixture) -> None:
        state = GAFState(tau=1.0)
        said_after = []
        for step in range(2600):
            end_step(state, out=[2] if step >= 100 else [], world_size=4)
            if caplog.messages:
                said_after.append((step, caplog.messages[0]))
                caplog.clear()
        steps = [step for step, _ in said_after]
        assert 300 <= steps[0] < 364  # decisions are added up 64 at a time
        assert 1000 <= steps[1] - steps[0] < 1064
        assert len(steps) == 3
        expected = "gaf_ddp: left out for long, is it broken? rank 2: kept "
        assert all(message.startswith(expected) for _, message in said_after)
        assert said_after[0][1].endswith("out since step 100")

    def test_none_where_all_are_out_and_none_from_other_ranks(self, caplog: pytest.LogCaptureFixture) -> None:
        state = GAFState(tau=1.0)
        for _ in range(300):
            end_step(state, out=[0, 1, 2], world_size=3)
        other = GAFState(tau=1.0)
        other._statistics.speaks = False
        for _ in range(300):
            end_step(other, out=[0], world_size=3)
        other.summary()
        assert caplog.messages == []


class TestMaxConsecutiveSkips:
    def skip(self, state: GAFState, agrees: bool = False) -> None:
        bad = decide(torch.ones(2, 2) if agrees else torch.full((2, 2), math.nan), Mean(), None)
        fine = decide(torch.ones(2, 2), Mean(), None)
        # In bucket scope one decision that agreed makes a step.
        state._end_step([(Decision(a, []), torch.zeros(2)) for a in ([bad, fine] if agrees else [bad, bad])])

    def test_ends_when_more_in_a_row_found_no_agreement(self) -> None:
        state = GAFState(tau=1.0, max_consecutive_skips=2)
        for agrees in (False, False, True, False, False):
            self.skip(state, agrees)
        with pytest.raises(RuntimeError, match="max_consecutive_skips is 2, found 3 steps in a row on which no"):
            self.skip(state)

    def test_accelerators_say_so_when_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device, "_HOST", "no device")
        state = GAFState(tau=1.0, max_consecutive_skips=1)
        self.skip(state)
        state.summary()
        with HostSyncs() as syncs:
            for agrees in (False, True, False):
                self.skip(state, agrees)
        assert syncs.calls == []
        for ask in (state.summary, state.report):
            with pytest.raises(RuntimeError, match="max_consecutive_skips is 1, found 2 steps in a row"):
                ask()

    @pytest.mark.parametrize("value", [-1, 1.0, True, "3"])
    def test_must_be_a_count(self, value: Any) -> None:
        with pytest.raises(ValueError, match="max_consecutive_skips must be None or an integer >= 0, found"):
            GAFState(max_consecutive_skips=value)


def train(device: torch.device, on_accelerators_way: bool) -> dict[str, Any]:
    """Return what is known after a rank's gradients were NaN, opposite ones made the last steps disagree."""
    if on_accelerators_way:
        take_accelerators_way()
    model, rank = ddp(Probe([40, 40]), device, bucket_cap_mb=0.0001), dist.get_rank()
    state = GAFState(tau=0.5, max_consecutive_skips=3)
    model.register_comm_hook(state, gaf_hook)
    for step in range(4):
        model.zero_grad()
        scale = math.nan if rank == 1 and step >= 2 else 1.0
        model(torch.full((80,), scale, device=device)).backward()
    found = state.report().as_dict()
    raised = "nothing"
    try:
        for _ in range(4):
            opposite = torch.zeros(80, device=device)
            opposite[rank::3] = 1.0
            model.zero_grad()
            model(opposite).backward()
        state.summary()
    except RuntimeError as error:
        raised = str(error)
    return {"report": found, "raised": raised, "steps": state.step}


@pytest.mark.parametrize("on_accelerators_way", [False, True])
def test_names_rank_and_host_and_ends_on_every_rank(gloo_ranks: Ranks, on_accelerators_way: bool) -> None:
    for found in gloo_ranks(3, train, on_accelerators_way):
        assert found["report"]["step"] == 4
        ranks = found["report"]["ranks"]
        assert {rank["host"] for rank in ranks} == {socket.gethostname()}
        assert [(rank["out_since"], rank["longest_out"]) for rank in ranks] == [(None, 0), (2, 2), (None, 0)]
        assert [rank["nonfinite"] for rank in ranks] == [0, ranks[1]["nonfinite"], 0]
        assert ranks[1]["nonfinite"] == 4  # two buckets
        assert "max_consecutive_skips is 3, found 4 steps in a row on which no gradients agreed" in found["raised"]
