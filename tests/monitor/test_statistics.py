"""What a state has of its decisions: means since the last reset, without what decided nothing."""

import pytest
import torch

from gaf_ddp.monitor.statistics import Statistics
from tests.monitor.decisions import decided, some_decisions


class TestStatistics:
    def test_are_means_since_the_last_reset_whoever_else_reads(self) -> None:
        statistics, decisions = Statistics(), some_decisions()
        for step, each in enumerate(decisions):
            statistics.record(step, [each], None)
            statistics.sums()
            statistics.report(step + 1)
        assert statistics.summary(3, reset=False)["gaf/kept_fraction"] == pytest.approx(0.5)
        assert statistics.summary(3, reset=True)["gaf/kept_fraction"] == pytest.approx(0.5)
        assert statistics.summary(3, reset=True) == {}
        statistics.record(3, decisions[:1], None)
        assert statistics.summary(4, reset=True)["gaf/kept_fraction"] == 1

    def test_leave_out_a_bucket_that_is_zero_everywhere(self) -> None:
        statistics, nothing = Statistics(), decided(torch.zeros(3, 3))
        statistics.record(0, [nothing], 0)  # nor is it a step on which nothing agreed
        assert statistics.summary(1, reset=True) == {}
        statistics.record(1, [nothing, decided(torch.ones(3, 3)), nothing], 0)
        found = statistics.summary(2, reset=True)
        assert (found["gaf/kept_fraction"], found["gaf/zero_fraction"]) == (1, 0)
        assert [rank.out_since for rank in statistics.report(2).ranks] == [None] * 3

    def test_of_other_ranks_begin_anew_also_after_they_were_reset(self) -> None:
        statistics, (fine, *_) = Statistics(), some_decisions()
        for step in range(9):
            statistics.record(step, [fine], None)
        statistics.summary(9, reset=True)
        statistics.record(9, [decided(torch.eye(3))], None)  # a job goes on with three ranks, and then with four
        statistics.record(10, [fine], None)
        assert statistics.summary(11, reset=True)["gaf/kept_fraction"] == 1
