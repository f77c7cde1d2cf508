"""AgreementMeter: running statistics that wait for the device only when read."""

import math

import pytest
import torch

from gaf_ddp import Agreement, Mean, NeighborhoodAgreement
from gaf_ddp import agreement as agreement_module
from gaf_ddp.agreement import AgreementMeter, decide
from tests.syncs import HostSyncs


def _decisions() -> list[Agreement]:
    """Return three decisions of four ranks: all kept, one left out of each kind, nothing agreed."""
    spoilt = torch.ones(4, 4)
    spoilt[0, 0], spoilt[1, 1], spoilt[2, 2] = math.nan, 0.0, 1.0
    apart = torch.tensor([[1.0, -0.5, 0, 0], [-0.5, 1, 0, 0], [0, 0, 1e6, 0], [0, 0, 0, 0]])
    return [decide(g, NeighborhoodAgreement(0.5), 10.0) for g in (torch.ones(4, 4), spoilt, apart)]


class TestMeter:
    def test_is_empty_before_any_decision(self) -> None:
        assert AgreementMeter().summary() == {}

    def test_averages_the_decisions(self) -> None:
        meter = AgreementMeter()
        for agreement in _decisions():
            meter.record(agreement)
        assert meter.summary() == pytest.approx(
            {
                "gaf/kept_fraction": (4 + 2 + 0) / 12,
                "gaf/skipped_fraction": 1 / 3,
                "gaf/mean_cosine": (1 + 1 - 0.5) / 3,
                "gaf/nonfinite_fraction": 1 / 12,
                "gaf/overlong_fraction": 1 / 12,
                "gaf/zero_fraction": 2 / 12,
                "gaf/kept_rank_00": 1 / 3,
                "gaf/kept_rank_01": 1 / 3,
                "gaf/kept_rank_02": 2 / 3,
                "gaf/kept_rank_03": 2 / 3,
            }
        )

    def test_leaves_decisions_without_pairs_out_of_the_mean_cosine(self) -> None:
        meter = AgreementMeter()
        meter.record(decide(torch.diag(torch.tensor([1.0, 0.0])), Mean(), None))
        assert math.isnan(meter.summary()["gaf/mean_cosine"])
        meter.record(decide(torch.tensor([[1.0, 0.25], [0.25, 1.0]]), Mean(), None))
        assert meter.summary()["gaf/mean_cosine"] == 0.25

    @pytest.mark.parametrize(
        ("name", "limit", "most"),
        [("_MOST_PENDING", 1, 0), ("_MOST_PENDING", 5, 4), ("_MOST_COSINES", 33, 1), ("_MOST_PENDING", 999, 40)],
    )
    def test_adding_up_later_changes_nothing(
        self, name: str, limit: int, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agreement_module, name, limit)
        meter, decisions = AgreementMeter(), _decisions()
        for i in range(20):
            meter.record(decisions[i % 3], decisions[(i + 1) % 3])
            assert len(meter._pending) <= most
        summary = meter.summary()
        assert meter.summary() == summary
        assert summary["gaf/kept_fraction"] == pytest.approx((4 * 13 + 2 * 14) / 160)
        assert summary["gaf/skipped_fraction"] == 13 / 40

    @pytest.mark.parametrize("limit", [1, 10**6])
    def test_waits_once_in_summary_and_never_in_record(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agreement_module, "_MOST_PENDING", limit)
        meter, decisions = AgreementMeter(), _decisions()
        with HostSyncs() as syncs:
            for agreement in decisions:
                meter.record(agreement)
        assert syncs.calls == []
        with HostSyncs() as syncs:
            meter.summary()
        assert len(syncs.calls) == 1

    def test_starts_anew_after_reset_and_for_another_world_size(self) -> None:
        meter = AgreementMeter()
        meter.record(decide(torch.eye(4), NeighborhoodAgreement(0.5), None))
        meter.reset()
        assert meter.summary() == {}
        meter.record(decide(torch.eye(4), NeighborhoodAgreement(0.5), None))
        meter.record(decide(torch.ones(3, 3), Mean(), None))
        assert meter.summary()["gaf/skipped_fraction"] == 0
        assert "gaf/kept_rank_03" not in meter.summary()

    def test_goes_on_from_its_state(self) -> None:
        one, other, whole = AgreementMeter(), AgreementMeter(), AgreementMeter()
        first, *rest = _decisions()
        one.record(first)
        other.load_state_dict(one.state_dict())
        for agreement in rest:
            other.record(agreement)
        for agreement in [first, *rest]:
            whole.record(agreement)
        assert other.summary() == whole.summary()
        assert one.summary()["gaf/kept_fraction"] == 1  # not touched by the copy that went on
