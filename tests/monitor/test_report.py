"""What a state's report says of its ranks, in words."""

from dataclasses import replace

import torch

from gaf_ddp import GAFState, Mean
from gaf_ddp.rules.agreement import decide
from tests.monitor.decisions import Standing, end_step, made


def take(state: GAFState, out: list[int], world_size: int) -> None:
    """End a step in which these ranks' gradients were zero."""
    gramian = torch.ones(world_size, world_size)
    gramian[out], gramian[:, out] = 0.0, 0.0
    end_step(state, decide(gramian, Mean(), None))


class TestReport:
    def test_names_the_ranks_that_matter_and_no_others(self) -> None:
        state = GAFState(tau=1.0)
        assert str(state.report()) == "step 0, 0 decisions, 0 ranks"
        for step in range(100):
            take(state, out=[1] if step >= 20 else [], world_size=4)
        lines = str(state.report()).splitlines()
        assert lines[0] == "step 100, 100 decisions, 4 ranks:"
        assert [line.split(":")[0] for line in lines[1:]] == ["  rank 1"]  # nobody need be told what zeros mean
        assert lines[1].endswith("kept 20 %, zero 80 times, out since step 20")

    def test_says_by_how_many_medians_a_norm_is_over(self) -> None:
        state = GAFState(tau=1.0, max_norm_ratio=4)
        for _ in range(12):
            gramian = torch.ones(4, 4)
            gramian[2], gramian[:, 2], gramian[2, 2] = 9.0, 9.0, 81.0
            end_step(state, decide(gramian, Mean(), 4.0))
        assert "rank 2: kept 0 %, norm over 4 medians 12 times, out since step 0\n" in str(state.report())
        assert state.report().as_dict()["max_norm_ratio"] == 4.0

    def test_says_turned_away_of_gradients_whose_mirror_image_would_agree(self) -> None:
        standing = Standing()
        for step in range(12):
            standing.add(
                step, [made([True, True, False], [1.0, 1.0, 2.0], voters=[True] * 3, flipped=[False, False, True])]
            )
        said = "rank 2: kept 0 %, z 2.0, turned away 12 times, out since step 0"
        _, line, advice = str(standing.report(12, [])).splitlines()
        assert line.endswith(said)
        assert advice.startswith("Rank 2 may be broken, or honest with data of its own: give the filter held-out data")
        (advice,) = replace(standing.report(12, []), has_held_out=True).advice()
        assert "own: held-out data say nothing of it yet, give more of them, or look at its data" in advice

    def test_says_what_held_out_data_say_and_what_to_do_next(self) -> None:
        standing = Standing()
        for step in range(30):
            decision = made([True, False, True], [1.0, 2.0, 8.0], voters=[True] * 3, trusted=[False, False, step >= 5],
                            condemned=[False, step >= 9, False])  # fmt: skip
            standing.add(step, [decision])
        report = standing.report(30, [])
        _, bad, good, advice = str(report).splitlines()
        assert (
            bad == "  rank 1: kept 0 %, z 2.0, out since step 0, condemned at step 9: its data raise the held-out loss"
        )
        assert good == "  rank 2: kept 100 %, z 8.0, trusted since step 5: its data lower the held-out loss"
        assert advice == "Held-out data speak against rank 1: look at its data and its device."
        watched = str(replace(report, watch=True)).splitlines()[-1]
        assert watched == "Watching only, everyone is averaged: state.watch = False leaves out rank 1."
        assert report.as_dict()["ranks"][2]["trusted_since"] == 5

    def test_says_that_two_ranks_cannot_outvote_each_other(self) -> None:
        two = Standing()
        for step in range(12):
            two.add(step, [made([True, False], [1.0, 1.0], voters=[True] * 2)])
        assert two.report(12, []).advice()[-1].startswith("Two ranks cannot outvote each other")

    def test_with_tau_says_nothing_of_held_out_data_nor_of_two_ranks(self) -> None:
        three, two = Standing(), Standing()
        for step in range(12):
            three.add(step, [made([True, True, False], voters=[True] * 3)])
            two.add(step, [made([False, False], voters=[True] * 2)])
        of_three, of_two = (replace(each.report(12, []), is_consensus=False) for each in (three, two))
        assert of_three.advice() == ["The others do not agree with rank 2: look at its data and its device."]
        said = "No rank was kept in half of the decisions: raise tau, or the batch size per rank."
        assert of_two.advice() == [said]

    def test_of_ranks_that_are_well_is_one_line(self) -> None:
        state = GAFState(tau=1.0)
        for _ in range(3):
            take(state, out=[], world_size=4)
        assert str(state.report()) == "step 3, 3 decisions, 4 ranks: all are kept"

    def test_is_not_reset_by_summary_but_saved(self) -> None:
        state = GAFState(tau=1.0)
        for _ in range(5):
            take(state, out=[0], world_size=3)
        summary = state.summary()
        assert [summary[f"gaf/out_rank_{rank:02d}"] for rank in range(3)] == [5, 0, 0]
        assert state.report().ranks[0].longest_out == 5
        restored = GAFState(tau=1.0)
        restored.load_state_dict(state.state_dict())
        assert restored.report() == state.report()
