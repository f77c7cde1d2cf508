"""What a state's report says of its ranks, in words."""

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
        assert [line.split(":")[0] for line in lines[1:]] == ["  rank 1"]
        assert lines[1].endswith("kept 20 %, zero 80 times, out since step 20")

    def test_says_by_how_many_medians_a_norm_is_over(self) -> None:
        state = GAFState(tau=1.0, max_norm_ratio=4)
        for _ in range(12):
            gramian = torch.ones(4, 4)
            gramian[2], gramian[:, 2], gramian[2, 2] = 9.0, 9.0, 81.0
            end_step(state, decide(gramian, Mean(), 4.0))
        assert str(state.report()).endswith("rank 2: kept 0 %, norm over 4 medians 12 times, out since step 0")
        assert state.report().as_dict()["max_norm_ratio"] == 4.0

    def test_says_turned_away_of_gradients_whose_mirror_image_would_agree(self) -> None:
        standing = Standing()
        for step in range(12):
            standing.add(
                step, [made([True, True, False], [1.0, 1.0, 2.0], voters=[True] * 3, flipped=[False, False, True])]
            )
        said = "rank 2: kept 0 %, z 2.0, turned away 12 times, out since step 0"
        assert str(standing.report(12, [])).endswith(said)

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
        restored = GAFState()
        restored.load_state_dict(state.state_dict())
        assert restored.report() == state.report()
