"""What an operator is told without asking: ranks that are out for long, and an end where nothing agrees."""

import math
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.monitor.statistics import Statistics
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.weighting import Mean
from gaf_ddp.runtime import device as devices
from tests.accelerator import take_accelerators_way
from tests.monitor.decisions import end_step, made
from tests.nets import Probe, ddp
from tests.syncs import HostSyncs

Ranks = Callable[..., list[Any]]


def without(*out: int) -> list[bool]:
    """Return who of four ranks is kept."""
    return [rank not in out for rank in range(4)]


class TestOfRanks:
    @pytest.mark.parametrize("every", [1, 3, 8])
    def test_one_of_a_rank_that_is_out_for_long_in_a_thousand_steps(
        self, every: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        statistics, said_after = Statistics(), []
        for step in range(every - 1, 2600, every):  # records of so many steps each
            statistics.record(step, [made(without(2) if step >= 100 else without())], None)
            if caplog.messages:
                said_after.append((step, caplog.messages[0]))
                caplog.clear()
        steps = [step for step, _ in said_after]
        assert 300 <= steps[0] < 364 + every  # decisions are looked at 64 at a time
        assert 1000 - every < steps[1] - steps[0] < 1064 + every
        assert len(steps) == 3
        expected = "gaf_ddp: left out for long, is it broken? rank 2: kept "
        assert all(message.startswith(expected) for _, message in said_after)
        assert 100 <= int(said_after[0][1].rpartition("out since step ")[2]) < 100 + every

    def test_none_where_all_are_out_and_none_from_other_ranks(self, caplog: pytest.LogCaptureFixture) -> None:
        statistics, other = Statistics(), Statistics()
        other.speaks = False
        for step in range(300):
            statistics.record(step, [made(without(0, 1, 2, 3))], None)
            other.record(step, [made(without(1))], None)
        other.summary(300, reset=True)
        assert caplog.messages == []

    def test_none_of_a_rank_that_has_finished(self, caplog: pytest.LogCaptureFixture) -> None:
        statistics = Statistics()
        for step in range(300):
            statistics.record(step, [made(without(3), finished=[False, False, False, True])], None)
        statistics.summary(300, reset=True)
        assert caplog.messages == []

    def test_in_summary_too_with_its_limit(self, caplog: pytest.LogCaptureFixture) -> None:
        state = GAFState(tau=1.0)
        state._records.statistics.speaks = False  # until it is asked
        for _ in range(250):
            end_step(state, made(without(1), overlong=[False, True, False, False]))
        state._records.statistics.speaks = True
        state.summary()
        state.summary()
        said = "rank 1: kept 0 %, norm over 10 medians 250 times, out since step 0"
        assert caplog.messages == [f"gaf_ddp: left out for long, is it broken? {said}"]


def spoilt(*ranks: int) -> Any:
    """Return a decision on four ranks, of which these have no finite gradient."""
    which = [rank in ranks for rank in range(4)]
    return made([not each for each in which], voters=[not each for each in which], nonfinite=which)


def test_where_no_rank_is_finite_any_more_with_the_first(caplog: pytest.LogCaptureFixture) -> None:
    statistics = Statistics()
    statistics.hosts = ["a", "b", "c", "d"]
    for step in range(10):
        statistics.record(step, [spoilt(0, 1, 2, 3)] if step < 9 else [spoilt()], None)  # as a loss scale does
    assert caplog.messages == []
    for step in range(50, 80):
        statistics.record(step, [spoilt(2) if step == 50 else spoilt(0, 1, 2, 3)], None)
    (message,) = [each for each in caplog.messages if "NaN or infinite" in each]
    assert "It began at step 50 with rank 2 (c). The parameters may be NaN: load a checkpoint" in message


def test_where_nothing_agrees_for_fifty_steps(caplog: pytest.LogCaptureFixture) -> None:
    statistics = Statistics()
    for step in range(60):
        statistics.record(step, [made(without(0, 1, 2, 3), voters=[True] * 4)], None)
    assert caplog.messages == ["gaf_ddp: nothing agreed in 50 steps in a row, so nothing was learned."]


def test_of_held_out_data_that_are_read_too_rarely_once_and_by_one_rank(caplog: pytest.LogCaptureFixture) -> None:
    often, rarely, other = Statistics(), Statistics(), Statistics()
    other.speaks = False
    for step in range(100, 400):
        for statistics, every in ((often, 20), (rarely, 50), (other, 50)):
            if step % every == 0:
                statistics.note_reading(step)
    (message,) = caplog.messages
    assert message.startswith("gaf_ddp: state.reference was called after 50 steps; call it every 10 to 20.")


@pytest.mark.parametrize(
    ("gramian", "words"),
    [
        (torch.eye(3), "nothing agreed in 75 % of the decisions; raise tau or the batch size per rank"),
        (torch.full((3, 3), math.nan), "75 % of the decisions; gradients are not finite: is wire_dtype float16, or"),
    ],
    ids=["apart", "nan"],
)
def test_warns_where_most_decisions_found_no_agreement(
    gramian: torch.Tensor, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = GAFState(tau=0.5)
    for each in (gramian, torch.ones(3, 3), gramian, gramian):
        end_step(state, decide(each, state._weighting_at(state.step), None))
    state.summary(reset=False)
    assert len(caplog.messages) == 1
    assert words in caplog.text


class TestMaxConsecutiveSkips:
    def skip(self, state: GAFState, agrees: bool = False) -> None:
        bad, fine = (decide(torch.full((2, 2), fill), Mean(), None) for fill in (math.nan, 1.0))
        end_step(state, bad, fine if agrees else bad)  # in bucket scope one decision that agreed makes a step

    def test_ends_when_more_in_a_row_found_no_agreement(self) -> None:
        state = GAFState(tau=1.0, max_consecutive_skips=2)
        for agrees in (False, False, True, False, False):
            self.skip(state, agrees)
        with pytest.raises(RuntimeError, match="max_consecutive_skips is 2, found 3 steps in a row on which no"):
            self.skip(state)

    def test_accelerators_say_so_a_step_later_or_when_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "_HOST", "no device")
        for ask in (GAFState.summary, GAFState.report, self.skip):
            state = GAFState(tau=1.0, max_consecutive_skips=1)
            for agrees in (False, True, False, False):
                self.skip(state, agrees)
            with pytest.raises(RuntimeError, match="max_consecutive_skips is 1, found 2 steps in a row"):
                ask(state)

    def test_accelerators_do_not_wait_for_the_last_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = GAFState(tau=1.0, max_consecutive_skips=5)
        monkeypatch.setattr(devices, "_HOST", "no device")
        fine = decide(torch.ones(2, 2), Mean(), None)
        with HostSyncs() as syncs:
            end_step(state, fine)
        assert syncs.calls == []

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
        assert [rank["nonfinite"] for rank in ranks] == [0, 4, 0]  # two buckets
        assert "max_consecutive_skips is 3, found 4 steps in a row on which no gradients agreed" in found["raised"]
