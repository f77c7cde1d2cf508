"""GAFState saved and pickled: each field, other world sizes, and what is left behind."""

import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gaf_ddp import GAFState, Mean, SequentialAgreement, gaf_hook
from gaf_ddp.agreement import decide
from tests.nets import Probe, ddp
from tests.test_state import filled

Ranks = Callable[..., list[Any]]


class TestStateDict:
    def test_holds_the_step_and_the_statistics(self) -> None:
        state = filled()
        copy = GAFState(tau=0.5, scope="model")
        copy.load_state_dict(state.state_dict())
        assert copy.step == 2
        assert copy.summary() == state.summary()

    def test_survives_torch_save_without_unpickling_code(self) -> None:
        file = io.BytesIO()
        torch.save(filled().state_dict(), file)
        file.seek(0)
        copy = GAFState()
        copy.load_state_dict(torch.load(file, weights_only=True))
        assert copy.step == 2
        assert copy.summary() == filled().summary()

    def test_of_a_fresh_state(self) -> None:
        copy = filled()
        copy.load_state_dict(GAFState().state_dict())
        assert (copy.step, copy.summary()) == (0, {})

    def test_leaves_the_settings_to_the_constructor(self) -> None:
        copy = GAFState(tau=1.5)
        copy.load_state_dict(filled().state_dict())
        assert (copy.tau, copy.scope) == (1.5, "bucket")

    def test_of_another_world_size_starts_the_statistics_anew(self) -> None:
        copy = GAFState()
        copy.load_state_dict(filled(5).state_dict())
        copy.meter.record(decide(torch.ones(3, 3), Mean(), None))
        assert copy.step == 2
        summary = copy.summary()
        assert summary["gaf/kept_fraction"] == 1
        assert "gaf/kept_rank_03" not in summary

    def test_anything_else_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"state_dict must hold step and meter, found \['meters'\]"):
            GAFState().load_state_dict({"meters": {}})

    def test_is_not_touched_by_later_steps(self) -> None:
        state = filled()
        saved = state.state_dict()
        state.meter.record(decide(torch.ones(3, 3), Mean(), None))
        copy = GAFState()
        copy.load_state_dict(saved)
        assert copy.summary() == filled().summary()


def a_schedule(step: int) -> float:
    return 0.5


class TestPickling:
    @pytest.mark.parametrize(
        "settings",
        [
            {"tau": 0.7},
            {"tau": a_schedule},
            {"weighting": SequentialAgreement(0.3, running="half")},
            {"scope": "model"},
            {"exchange": "gather"},
            {"start_step": 7},
            {"vote_momentum": 0.5},
            {"wire_dtype": torch.bfloat16},
            {"max_norm_ratio": None},
            {"max_norm_ratio": 3.0},
        ],
        ids=str,
    )
    def test_keeps_each_setting(self, settings: dict[str, Any]) -> None:
        copy = pickle.loads(pickle.dumps(GAFState(**settings)))
        for name, value in settings.items():
            assert repr(getattr(copy, name)) == repr(value)

    def test_keeps_step_and_statistics(self) -> None:
        copy = pickle.loads(pickle.dumps(filled()))
        assert copy.step == 2
        assert copy.summary() == filled().summary()

    def test_leaves_the_group_and_all_that_hangs_on_it(self, ranks: Ranks) -> None:
        for found in ranks(2, pickle_after_a_step):
            assert found["warnings"] == [
                "gaf_ddp: process_group is not pickled; the copy will use the default group"
            ]
            assert found["group"] is None
            assert found["agreement"] is None
            assert found["steps"] == 2


def pickle_after_a_step(device: torch.device) -> dict[str, Any]:
    """Take a step in a group of its own, pickle the state, and go on with the copy in the default group."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    def step(state: GAFState, **options: Any) -> None:
        model = ddp(Probe([20, 20]), device, **options)
        model.register_comm_hook(state, gaf_hook)
        model(torch.ones(40, device=device)).backward()

    logging.getLogger("gaf_ddp").addHandler(Keep())
    group = dist.new_group([0, 1])
    state = GAFState(group)  # type: ignore[arg-type]
    step(state, process_group=group)
    copy = pickle.loads(pickle.dumps(state))
    found = {"warnings": messages, "group": copy.process_group, "agreement": copy.agreement}
    step(copy)
    return {**found, "steps": copy.step}
