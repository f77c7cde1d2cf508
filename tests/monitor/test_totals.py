"""AgreementMeter: running statistics that wait for the device only when read."""

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaf_ddp.monitor.summary import AgreementMeter
from torch import Tensor

from gaf_ddp import Agreement, Mean, NeighborhoodAgreement
from gaf_ddp import device as devices
from gaf_ddp.rules.agreement import decide
from tests.syncs import HostSyncs

Decision = tuple[Agreement, Tensor]


def decided(inner: Tensor, tau: float = 0.5, ratio: float | None = None) -> Decision:
    """Return a decision with the numbers of ranks whose settings are the same."""
    return decide(inner, NeighborhoodAgreement(tau), ratio), torch.full((len(inner),), 7.0, dtype=torch.float64)


def some_decisions() -> list[Decision]:
    """Return three decisions of four ranks: all kept, one left out of each kind, nothing agreed."""
    spoilt = torch.ones(4, 4)
    spoilt[0, 0], spoilt[1, 1], spoilt[2, 2] = math.nan, 0.0, 1.0
    apart = torch.tensor([[1.0, -0.5, 0, 0], [-0.5, 1, 0, 0], [0, 0, 1e6, 0], [0, 0, 0, 0]])
    return [decided(inner, ratio=10.0) for inner in (torch.ones(4, 4), spoilt, apart)]


class TestSummary:
    def test_is_empty_before_any_decision(self) -> None:
        assert AgreementMeter().summary() == {}

    def test_averages_the_decisions(self) -> None:
        meter = AgreementMeter()
        for decision in some_decisions():
            meter.record([decision])
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
        meter.record([decided(torch.diag(torch.tensor([1.0, 0.0])))])
        assert math.isnan(meter.summary()["gaf/mean_cosine"])
        meter.record([decided(torch.tensor([[1.0, 0.25], [0.25, 1.0]]))])
        assert meter.summary()["gaf/mean_cosine"] == 0.25

    def test_has_distances_where_a_rule_knows_them(self) -> None:
        meter, (agreement, numbers) = AgreementMeter(), decided(torch.eye(3))
        meter.record([(agreement, numbers)])
        assert not any("distance" in name for name in meter.summary())
        for z in ([1.0, 1e20, math.nan], [2.0, 4.0, math.nan]):  # the farthest counts as 100
            meter.record([(replace(agreement, distance=torch.tensor(z, dtype=torch.float64)), numbers)])
        summary = meter.summary()
        distances = [summary[f"gaf/distance_rank_{rank:02d}"] for rank in range(3)]
        assert distances == pytest.approx([1.5, 52.0, math.nan], nan_ok=True)
        meter.reset()
        assert meter.summary() == {}

    def test_is_the_same_however_decisions_come_and_whenever_it_is_read(self) -> None:
        decisions = [some_decisions()[i % 3] for i in range(200)]
        at_once, one_by_one, read_often = AgreementMeter(), AgreementMeter(), AgreementMeter()
        at_once.record(decisions)
        for i, decision in enumerate(decisions):
            one_by_one.record([decision])
            read_often.record([decision])
            if i % 7 == 0:
                read_often.summary()
        expected = at_once.summary()
        assert expected["gaf/kept_fraction"] == pytest.approx((4 * 67 + 2 * 67) / 800)
        for meter in (at_once, one_by_one, read_often):
            assert meter.summary() == pytest.approx(expected)

    def test_starts_anew_after_reset_and_for_another_world_size(self) -> None:
        meter = AgreementMeter()
        meter.record([decided(torch.eye(4))])
        meter.reset()
        assert meter.summary() == {}
        meter.record([decided(torch.eye(4))])
        meter.record([decided(torch.ones(3, 3))])
        assert meter.summary()["gaf/skipped_fraction"] == 0
        assert "gaf/kept_rank_03" not in meter.summary()


@pytest.mark.parametrize("count", [1, 200])
def test_waits_once_in_summary_and_never_in_record(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_HOST", "no device")
    meter, decisions = AgreementMeter(), some_decisions()
    with HostSyncs() as syncs:
        for i in range(count):
            meter.record([decisions[i % 3]])
    assert syncs.calls == []
    for read in (meter.summary, meter.state_dict, meter.require_sound):
        with HostSyncs() as syncs:
            read()
        assert len(syncs.calls) == 1


@pytest.mark.parametrize(("world_size", "most"), [(4, 63), (32, 15), (200, 0)])
def test_holds_few_decisions_and_of_many_ranks_fewer(world_size: int, most: int) -> None:
    meter, recorded = AgreementMeter(), []
    for _ in range(150):
        agreement, numbers = decided(torch.eye(world_size))
        recorded.append(weakref.ref(agreement))
        meter.record([(agreement, numbers)])
        del agreement
        assert sum(reference() is not None for reference in recorded) <= most
    assert meter.summary()["gaf/skipped_fraction"] == 1


class TestRequireSound:
    """What accelerators cannot tell at once."""

    def test_tells_whose_settings_differ(self) -> None:
        meter = AgreementMeter()
        meter.record(some_decisions())
        meter.require_sound()
        agreement, numbers = some_decisions()[0]
        meter.record([(agreement, torch.tensor([7.0, 8.0, 7.0, 7.0])), (agreement, numbers)])
        for call in (meter.require_sound, meter.summary):
            with pytest.raises(ValueError, match=r"settings must be the same on .* others than rank 0's on \[1\]"):
                call()

    @pytest.mark.parametrize("weight", [math.nan, math.inf, -0.5])
    def test_tells_of_weights_that_are_none(self, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "_HOST", "no device")
        meter, numbers = AgreementMeter(), torch.zeros(4)
        bad = decide(torch.eye(4), lambda inner: torch.full_like(inner[0], weight), None)
        meter.record([(bad, numbers), (decide(torch.eye(4), Mean(), None), numbers)])
        for call in (meter.require_sound, meter.summary):
            with pytest.raises(ValueError, match="weighting must return finite weights >= 0, found others in 1 dec"):
                call()

    def test_does_not_blame_the_weighting_where_nobody_votes(self) -> None:
        meter = AgreementMeter()
        meter.record([decided(torch.full((2, 2), math.nan))])
        assert meter.summary()["gaf/nonfinite_fraction"] == 1


class TestStateDict:
    def test_goes_on_from_it(self) -> None:
        one, other, whole = AgreementMeter(), AgreementMeter(), AgreementMeter()
        first, *rest = some_decisions()
        one.record([first])
        other.load_state_dict(one.state_dict())
        other.record(rest)
        whole.record([first, *rest])
        assert other.summary() == whole.summary()
        assert one.summary()["gaf/kept_fraction"] == 1  # not touched by the copy that went on

    def test_has_the_same_keys_always_and_plain_numbers(self) -> None:
        meter = AgreementMeter()
        empty = meter.state_dict()
        meter.record(some_decisions())
        full = meter.state_dict()
        assert empty.keys() == full.keys()
        assert set(map(len, empty.values())) == {0}
        assert set(map(len, full.values())) == {1, 4}
        assert {type(number) for numbers in full.values() for number in numbers} == {float}

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: None,
            lambda state: {},
            lambda state: {**state, "more": []},
            lambda state: {name: numbers for name, numbers in state.items() if name != "kept"},
            lambda state: {**state, "kept": state["kept"][1:]},
            lambda state: {**state, "decisions": []},
            lambda state: {**state, "kept": 4.0},
            lambda state: {**state, "kept": None},
            lambda state: {**state, "kept": ["1"] * 4},
            lambda state: {**state, "kept": [True] * 4},
            lambda state: {**state, "skipped": [None]},
            lambda state: {name: [] if len(numbers) == 1 else numbers for name, numbers in state.items()},
        ],
    )
    def test_anything_else_is_refused_and_changes_nothing(self, change: Any) -> None:
        meter = AgreementMeter()
        meter.record(some_decisions())
        before = meter.summary()
        with pytest.raises(ValueError, match=r"meter must hold lists of numbers as state_dict\(\) returns them"):
            meter.load_state_dict(change(meter.state_dict()))
        assert meter.summary() == before
