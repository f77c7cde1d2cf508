"""GAFState saved and pickled: each field, other world sizes, and what is left behind."""

import copy
import io
import logging
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gaf_ddp import GAFState, SequentialAgreement, gaf_hook
from tests.nets import Probe, ddp
from tests.test_state import end_step, filled

Ranks = Callable[..., list[Any]]


KINDS = {"version": int, "step": int, "totals": dict, "reset": dict, "history": dict, "noise": dict, "memory": bytes}
HOLDS = "state_dict must hold ['history', 'memory', 'noise', 'reset', 'step', 'totals', 'version'], found"


class TestStateDict:
    def test_holds_the_step_and_the_statistics(self) -> None:
        state = filled()
        restored = GAFState(tau=0.5, scope="model")
        restored.load_state_dict(state.state_dict())
        assert restored.step == 2
        assert restored.summary() == state.summary()

    def test_survives_torch_save_without_unpickling_code(self) -> None:
        file = io.BytesIO()
        torch.save(filled().state_dict(), file)
        file.seek(0)
        restored = GAFState()
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert restored.step == 2
        assert restored.summary() == filled().summary()

    def test_of_a_fresh_state(self) -> None:
        restored = filled()
        restored.load_state_dict(GAFState().state_dict())
        assert (restored.step, restored.summary()) == (0, {})

    def test_leaves_the_settings_to_the_constructor(self) -> None:
        restored = GAFState(tau=1.5)
        restored.load_state_dict(filled().state_dict())
        assert (restored.tau, restored.scope) == (1.5, "bucket")

    def test_of_another_world_size_starts_the_statistics_anew(self) -> None:
        restored = GAFState(tau=0.5)
        restored.load_state_dict(filled(5).state_dict())
        end_step(restored, torch.ones(3, 3))
        assert restored.step == 3
        summary = restored.summary()
        assert summary["gaf/kept_fraction"] == 1
        assert "gaf/kept_rank_03" not in summary

    def test_is_plain_and_of_one_form(self) -> None:
        empty, full = GAFState().state_dict(), filled(5).state_dict()
        for state_dict in (empty, full):
            assert {name: type(value) for name, value in state_dict.items()} == KINDS
            assert state_dict["version"] == 4
            for part in ("totals", "reset", "history"):
                assert state_dict[part].keys() == full[part].keys()
                assert {type(numbers) for numbers in state_dict[part].values()} == {list}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"step": "7"}, "state_dict's step must be an integer >= 0, found '7'"),
            ({"step": -3}, "state_dict's step must be an integer >= 0, found -3"),
            ({"step": None}, "state_dict's step must be an integer >= 0, found None"),
            ({"step": math.nan}, "state_dict's step must be an integer >= 0, found nan"),
            ({"step": 7.0}, "state_dict's step must be an integer >= 0, found 7.0"),
            ({"step": True}, "state_dict's step must be an integer >= 0, found True"),
            ({"version": 2}, "state_dict's version must be 4, found 2"),
            ({"version": None}, "state_dict's version must be 4, found None"),
            ({"totals": {}}, "totals must hold lists of finite numbers as state_dict() returns them, found {}"),
            ({"totals": None}, "totals must hold lists of finite numbers as state_dict() returns them, found None"),
            ({"reset": {}}, "totals must hold lists of finite numbers as state_dict() returns them, found {}"),
            ({"history": {}}, "history must hold lists of finite numbers as state_dict() returns them, found {}"),
            ({"history": {"kept": [1.0]}}, "history must hold lists of finite numbers as state_dict() returns them"),
            ({"memory": None}, "state_dict's memory must be bytes, found None"),
            ({"memory": "text"}, "state_dict's memory must be bytes, found 'text'"),
            ({"tau": 0.5}, HOLDS),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_anything_else_is_refused_and_changes_nothing(self, change: dict[str, Any], message: str) -> None:
        state, other = filled(3), filled(5)
        end_step(other, torch.ones(5, 5))
        before = state.state_dict()
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            state.load_state_dict({**other.state_dict(), **change})
        assert state.state_dict() == before

    @pytest.mark.parametrize("missing", KINDS)
    def test_none_of_it_may_be_missing(self, missing: str) -> None:
        state, whole = filled(3), filled(5).state_dict()
        before = state.state_dict()
        with pytest.raises(ValueError, match=re.escape(HOLDS)):
            state.load_state_dict({name: value for name, value in whole.items() if name != missing})
        assert state.state_dict() == before

    @pytest.mark.parametrize("memory", [b"", b"text", b"PK" * 100])
    def test_a_memory_that_is_none_is_refused_and_changes_nothing(self, memory: bytes) -> None:
        state = GAFState()
        before = state.state_dict()
        with pytest.raises(ValueError, match=r"memory must be what state_dict\(\) returned, found b'"):
            state.load_state_dict({**before, "step": 5, "memory": memory})
        assert state.state_dict() == before

    @pytest.mark.parametrize("none", [None, [], "version", 3])
    def test_must_be_a_dictionary(self, none: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(HOLDS)):
            GAFState().load_state_dict(none)

    def test_is_not_touched_by_later_steps(self) -> None:
        state = filled()
        saved = state.state_dict()
        end_step(state, torch.ones(3, 3))
        restored = GAFState()
        restored.load_state_dict(saved)
        assert restored.summary() == filled().summary()


class TestDistributedCheckpoint:
    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as asked for
    @pytest.mark.parametrize("target", [GAFState(tau=0.5), filled(3), filled(5)], ids=["fresh", "W=3", "W=5"])
    @pytest.mark.parametrize("as_dict", [True, False])
    def test_loads_into_any_state(self, tmp_path: Path, target: GAFState, as_dict: bool) -> None:
        state = filled(3)
        end_step(state, torch.ones(3, 3))
        target = copy.deepcopy(target)
        if as_dict:
            save({"gaf": state.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
            loaded = {"gaf": target.state_dict()}
            load(loaded, checkpoint_id=tmp_path, no_dist=True)
            target.load_state_dict(loaded["gaf"])
        else:  # whatever has state_dict and load_state_dict
            save({"gaf": state}, checkpoint_id=tmp_path, no_dist=True)
            load({"gaf": target}, checkpoint_id=tmp_path, no_dist=True)
        assert target.state_dict() == state.state_dict()

    def test_works_between_ranks(self, ranks: Ranks, tmp_path: Path) -> None:
        ranks(2, checkpoint, tmp_path)


def checkpoint(device: torch.device, folder: Path) -> None:
    """Save after two steps, load into a fresh state that trains already, and go on."""
    model, state, fresh = ddp(Probe([20, 20]), device), GAFState(), GAFState()
    model.register_comm_hook(state, gaf_hook)
    for _ in range(2):
        model(torch.ones(40, device=device)).backward()
    save({"model": model, "gaf": state}, checkpoint_id=folder)
    model = ddp(Probe([20, 20]), device)
    model.register_comm_hook(fresh, gaf_hook)
    load({"model": model, "gaf": fresh}, checkpoint_id=folder)
    assert fresh.state_dict() == state.state_dict()
    model(torch.ones(40, device=device)).backward()
    assert fresh.step == 3
    assert fresh.summary()["gaf/kept_fraction"] == 1


def a_schedule(step: int) -> float:
    return 0.5


class TestPickling:
    @pytest.mark.parametrize(
        "settings",
        [
            {"tau": 0.7},
            {"tau": a_schedule},
            {"weighting": SequentialAgreement(0.3, running="half")},
            {"scope": "model", "tau": 1.0},
            {"exchange": "gather", "tau": 1.0},
            {"start_step": 7},
            {"momentum": 0.5, "judge_every": 4},
            {"sketch_size": 100},
            {"watch": True},
            {"wire_dtype": torch.bfloat16},
            {"max_norm_ratio": None},
            {"max_norm_ratio": 3.0},
        ],
        ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
    )
    def test_keeps_each_setting(self, settings: dict[str, Any]) -> None:
        restored = pickle.loads(pickle.dumps(GAFState(**settings)))
        for name, value in settings.items():
            assert repr(getattr(restored, name)) == repr(value)

    def test_keeps_step_and_statistics(self) -> None:
        restored = pickle.loads(pickle.dumps(filled()))
        assert restored.step == 2
        assert restored.summary() == filled().summary()

    def test_leaves_the_group_and_all_that_hangs_on_it(self, ranks: Ranks) -> None:
        for found in ranks(2, pickle_after_a_step):
            assert found["warnings"] == []  # copies of a model, as for its moving average, are no news
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
    restored = pickle.loads(pickle.dumps(state))
    found = {"warnings": messages, "group": restored.process_group, "agreement": restored.agreement}
    step(restored)
    return {**found, "steps": restored.step}


def save_memory(device: torch.device, voters: str) -> tuple[torch.Size, list[int]]:
    """Return the shapes of what is saved of the ranks' gradients, after two steps."""
    state, model = GAFState(voters=voters), ddp(Probe([20, 20]), device)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    for _ in range(2):
        model(torch.ones(40, device=device)).backward()
    memory = torch.load(io.BytesIO(state.state_dict()["memory"]), weights_only=True)
    return memory["momenta"].shape, [len(memory["kept"]), *memory["cosines"].shape]


def test_every_rank_saves_all_voters_momenta(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(2, save_memory, "rank") == [(torch.Size([2, 4096]), [2, 2, 2, 2])] * 2
    assert gloo_ranks(2, save_memory, "host") == [(torch.Size([1, 4096]), [1, 2, 1, 1])] * 2
