"""GAFState: its settings and what it tells."""

import logging
import logging.handlers
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import ConsensusAgreement, GAFState, Mean, NeighborhoodAgreement, SequentialAgreement, gaf_hook
from gaf_ddp.connect import connect
from gaf_ddp.monitor.records import Decision
from gaf_ddp.rules.agreement import decide
from tests.gradients import random_gradients
from tests.nets import Probe, ddp
from tests.properties import gramian_of

Ranks = Callable[..., list[Any]]


def filled(world_size: int = 3) -> GAFState:
    """Return a state with two decisions on record, as if after two steps in model scope."""
    state = GAFState(tau=0.5, scope="model")
    for gramian in (torch.ones(world_size, world_size), torch.eye(world_size)):
        end_step(state, gramian)
    return state


def end_step(state: GAFState, gramian: Tensor) -> None:
    """Let a step end on which the state's own rule decided on this Gramian."""
    agreement = decide(gramian, state._weighting_at(state.step), state.max_norm_ratio)
    state._records.add(state.step, [Decision(agreement, [])], [torch.zeros(len(gramian))], None)
    state._end_step()


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"process_group": 3}, "process_group must be a torch.distributed.ProcessGroup that this rank"),
            ({"process_group": "gloo"}, "found 'gloo'"),
            ({"tau": -0.1}, r"tau must be a cosine distance in \[0, 2\], found -0.1"),
            ({"tau": 2.1}, r"tau must be a cosine distance in \[0, 2\], found 2.1"),
            ({"tau": float("nan")}, r"tau must be a cosine distance in \[0, 2\], found nan"),
            ({"tau": "0.9"}, r"tau must be a cosine distance in \[0, 2\], found '0.9'"),
            ({"tau": True}, r"tau must be a cosine distance in \[0, 2\], found True"),
            ({"tau": 1.0, "weighting": Mean()}, "tau and weighting exclude each other: .* found 1.0"),
            ({"weighting": 0.9}, "weighting must be callable, and no class, or None, found 0.9"),
            ({"weighting": Mean}, "weighting must be callable, and no class, or None, found <class"),
            ({"scope": "layer"}, "scope must be 'bucket', 'model' or None, found 'layer'"),
            ({"tau": 1.0, "scope": "running"}, "scope must be 'bucket', 'model' or None, found 'running'"),
            ({"scope": "bucket"}, "scope is for tau and weighting: the consensus rule .*, found 'bucket'"),
            ({"exchange": "gather"}, "exchange is for tau and weighting: the consensus rule .*, found 'gather'"),
            ({"exchange": "ring"}, "exchange must be 'auto', 'sketch', 'sharded' or 'gather', found 'ring'"),
            ({"sketch_size": 63}, "sketch_size must be an integer >= 64, found 63"),
            ({"sketch_size": 64.0}, "sketch_size must be an integer >= 64, found 64.0"),
            ({"watch": 1}, "watch must be True or False, found 1"),
            ({"start_step": -1}, "start_step must be an integer >= 0, found -1"),
            ({"start_step": 1.5}, "start_step must be an integer >= 0, found 1.5"),
            ({"start_step": True}, "start_step must be an integer >= 0, found True"),
            ({"wire_dtype": torch.float64}, "wire_dtype must be None, torch.float16, .*found torch.float64"),
            ({"wire_dtype": torch.int8}, "wire_dtype must be None, torch.float16, .*found torch.int8"),
            ({"wire_dtype": "bf16"}, "wire_dtype must be None, torch.float16, .*found 'bf16'"),
            ({"max_norm_ratio": 0.5}, "max_norm_ratio must be None or a number >= 1, found 0.5"),
            ({"max_norm_ratio": float("nan")}, "max_norm_ratio must be None or a number >= 1, found nan"),
            ({"max_norm_ratio": "10"}, "max_norm_ratio must be None or a number >= 1, found '10'"),
            ({"momentum": 1}, r"momentum must be a number in \[0, 1\), found 1"),
            ({"momentum": -0.1}, r"momentum must be a number in \[0, 1\), found -0.1"),
            ({"momentum": None}, r"momentum must be a number in \[0, 1\), found None"),
            ({"judge_every": 0}, "judge_every must be None or an integer >= 1, found 0"),
            ({"judge_every": 1.0}, "judge_every must be None or an integer >= 1, found 1.0"),
            ({"voters": "node"}, "voters must be 'rank' or 'host', found 'node'"),
            ({"voters": "host", "tau": 1.0}, "voters='host' is for the consensus rule.*, found 'host'"),
            ({"momentum": 0.9, "tau": 1.0}, "momentum is for the consensus rule: tau and weighting.*, found 0.9"),
            ({"max_norm_ratio": True}, "max_norm_ratio must be None or a number >= 1, found True"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_out_of_range_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GAFState(**settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {"tau": 0},
            {"tau": 2},
            {"tau": lambda step: 1.0},
            {"weighting": lambda gramian: gramian[0]},
            {"scope": "bucket", "exchange": "gather", "tau": 1.0},
            {"scope": "model", "exchange": "sharded", "tau": 1.0},
            {"scope": "model", "exchange": "sketch"},
            {"start_step": 0},
            {"wire_dtype": torch.float16},
            {"wire_dtype": torch.bfloat16},
            {"wire_dtype": torch.float32},
            {"max_norm_ratio": 1},
            {"max_norm_ratio": float("inf")},
            {"max_norm_ratio": None},
            {"momentum": 0},
            {"momentum": 0.9, "judge_every": 8},
            {"weighting": ConsensusAgreement(2.0), "scope": "model"},
            {"sketch_size": 64},
            {"watch": True},
            {"watch": True, "tau": 1.0},
            {"voters": "host"},
        ],
        ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
    )
    def test_in_range_are_kept(self, settings: dict[str, Any]) -> None:
        state = GAFState(**settings)
        for name, value in settings.items():
            assert getattr(state, name) == value

    def test_defaults(self) -> None:
        state = GAFState()
        assert (state.tau, state.scope, state.exchange, state.start_step) == (None, "model", "sketch", 0)
        assert (state.process_group, state.weighting, state.wire_dtype) == (None, None, None)
        assert (state.max_norm_ratio, state.momentum, state.sketch_size, state.watch) == (10, 0.99, 4096, False)
        assert (state.voters, state.judge_every, state.check_every) == ("rank", None, None)
        assert (state.step, state.agreement, state.decisions, state.summary()) == (0, None, [], {})

    @pytest.mark.parametrize("settings", [{"tau": 1.0}, {"weighting": Mean()}], ids=str)
    def test_defaults_of_other_rules(self, settings: dict[str, Any]) -> None:
        state = GAFState(**settings)
        assert (state.scope, state.exchange) == ("bucket", "auto")

    def test_a_rank_outside_the_group_is_told(self, gloo_ranks: Ranks) -> None:
        found = gloo_ranks(2, make_state_of_a_part)
        assert found[0] == "made"
        assert "process_group must be a torch.distributed.ProcessGroup that this rank is in" in found[1]


def make_state_of_a_part(device: torch.device) -> str:
    group = dist.new_group([0])
    try:
        GAFState(group)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return "made"


class TestWeightingNow:
    def test_is_the_mean_before_start_step(self) -> None:
        state = GAFState(tau=0.5, start_step=2)
        kinds = []
        for state.step in range(4):
            kinds.append(type(state._weighting_at(state.step)))
        assert kinds == [Mean, Mean, NeighborhoodAgreement, NeighborhoodAgreement]

    def test_follows_the_schedule(self) -> None:
        state = GAFState(tau=lambda step: 1.0 - 0.1 * step)
        state.step = 3
        weighting = state._weighting_at(state.step)
        assert isinstance(weighting, NeighborhoodAgreement)
        assert weighting.tau == pytest.approx(0.7)

    @pytest.mark.parametrize("tau", [3.0, -1.0, float("nan"), None, "1"])
    def test_checks_what_the_schedule_returns(self, tau: Any) -> None:
        with pytest.raises(ValueError, match=r"tau must be a cosine distance in \[0, 2\], found"):
            GAFState(tau=lambda step: tau)._weighting_at(0)

    def test_is_the_users_own(self) -> None:
        own = SequentialAgreement(0.5)
        assert GAFState(weighting=own)._weighting_at(0) is own


class TestSummary:
    def test_is_empty_before_any_step(self) -> None:
        assert GAFState().summary() == {}

    def test_starts_anew_after_reading(self) -> None:
        state = filled()
        once = state.summary(reset=False)
        assert state.summary() == once
        assert once["gaf/kept_fraction"] == 0.5
        assert state.summary() == {}

    @pytest.mark.parametrize(("agreed", "warns"), [(1, False), (0, True)])
    def test_warns_when_most_decisions_found_no_agreement(
        self, caplog: pytest.LogCaptureFixture, agreed: int, warns: bool
    ) -> None:
        state = filled()  # one of two agreed
        end_step(state, torch.eye(3) if warns else torch.ones(3, 3))
        with caplog.at_level(logging.WARNING, logger="gaf_ddp"):
            state.summary()
        assert ["raise tau or the batch size per rank" in message for message in caplog.messages] == [True] * warns

    def test_gradients_that_are_not_finite_are_not_blamed_on_tau(self, caplog: pytest.LogCaptureFixture) -> None:
        state = GAFState(tau=0.5, wire_dtype=torch.float16)
        end_step(state, torch.full((3, 3), torch.inf))
        with caplog.at_level(logging.WARNING, logger="gaf_ddp"):
            state.summary()
        [message] = caplog.messages
        assert "gradients are not finite: is wire_dtype float16" in message


def warnings_of_one_step(device: torch.device) -> list[str]:
    """Return what a rank logs after a step on which opposite gradients did not agree."""
    model = ddp(Probe([40]), device)
    state = GAFState(tau=0.5)
    model.register_comm_hook(state, gaf_hook)
    model((1.0 - 2.0 * dist.get_rank()) * torch.ones(40, device=device)).backward()
    said = logging.handlers.MemoryHandler(100)
    logging.getLogger("gaf_ddp").addHandler(said)
    assert state.summary()["gaf/skipped_fraction"] == 1
    return [record.getMessage() for record in said.buffer]


def test_one_rank_warns_for_all(ranks: Ranks) -> None:
    first, second = ranks(2, warnings_of_one_step)
    assert first == ["gaf_ddp: nothing agreed in 100 % of the decisions; raise tau or the batch size per rank"]
    assert second == []


def look_at_agreement(device: torch.device, scope: str) -> list[tuple[int, ...]]:
    """Return the shapes of a step's record, field by field."""
    model = ddp(Probe([40, 40, 40]), device, bucket_cap_mb=0.0001)
    state = GAFState(tau=2.0, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    for _ in range(2):
        model(torch.ones(120, device=device)).backward()
    agreement = state.agreement
    assert agreement is not None
    assert agreement.gramian.device == device
    fields: list[Tensor] = [agreement.gramian, agreement.cosine, agreement.weights, agreement.agreed]
    return [tuple(field.shape) for field in fields]


def test_agreement_is_stacked_in_bucket_scope(ranks: Ranks) -> None:
    assert ranks(2, look_at_agreement, "bucket") == [[(3, 2, 2), (3, 2, 2), (3, 2), (3,)]] * 2
    assert ranks(2, look_at_agreement, "model") == [[(2, 2), (2, 2), (2,), ()]] * 2


def judge_in_their_dtype(device: torch.device) -> list[float]:
    """Return how far the Gramian is off, relatively, for models of one dtype each, and in model scope of two."""
    errors = []
    for dtypes in ([torch.float32] * 2, [torch.float64] * 2, [torch.float32, torch.float64]):
        model = ddp(Probe([5000, 5000], dtypes), device)
        state = GAFState(tau=1.0, scope="model")
        model.register_comm_hook(state, gaf_hook)
        gradients = random_gradients(2, 10_000)  # what float32 can hold
        model(gradients[dist.get_rank()].double().to(device)).backward()
        assert state.agreement is not None
        assert state.agreement.gramian.dtype == torch.float64
        exact = gramian_of(gradients)
        errors.append(((state.agreement.gramian.cpu() - exact).abs() / exact.abs()).max().item())
    return errors


def test_gradients_are_judged_in_their_dtype_or_better(ranks: Ranks) -> None:
    for single, double, mixed in ranks(2, judge_in_their_dtype):
        assert single < 1e-5
        assert double < 1e-12
        assert mixed < 1e-5


def assign_after_the_first_bucket(device: torch.device, settings: dict[str, Any]) -> dict[str, str]:
    """Return what is said of each setting that is assigned while training."""
    model, state = ddp(Probe([40]), device), GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    model(torch.ones(40, device=device)).backward()
    said = {}
    for name in ("scope", "exchange", "wire_dtype", "sketch_size", "voters", "momentum", "judge_every", "check_every"):
        try:
            setattr(state, name, getattr(GAFState(), name))
            said[name] = "nothing"
        except AttributeError as error:
            said[name] = str(error)
    state.start_step, state.max_norm_ratio = 5, None
    return said


@pytest.mark.parametrize("settings", [{}, {"tau": 1.0}], ids=str)
def test_what_holds_from_the_first_bucket_on_cannot_be_assigned(gloo_ranks: Ranks, settings: dict[str, Any]) -> None:
    for said in gloo_ranks(2, assign_after_the_first_bucket, settings):
        for name, message in said.items():
            assert message == f"{name} holds from the first bucket on: make a new GAFState for a new model"


def test_a_setting_that_there_is_not_is_refused() -> None:
    with pytest.raises(AttributeError, match="GAFState has no setting 'wacth'"):
        GAFState().wacth = True
    with pytest.raises(TypeError, match=r"GAFState.__init__\(\) got an unexpected keyword argument 'tua'"):
        GAFState(tua=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(("name", "value"), [("tau", 0.9), ("weighting", Mean())])
def test_the_consensus_rule_cannot_be_exchanged_for_another(name: str, value: Any) -> None:
    with pytest.raises(AttributeError, match=f"{name} cannot be assigned where the consensus rule judges"):
        setattr(GAFState(), name, value)


def test_what_is_assigned_is_checked() -> None:
    state = GAFState(tau=1.0)
    with pytest.raises(ValueError, match="watch must be True or False, found 3"):
        state.watch = 3  # type: ignore[assignment]


def test_a_state_without_a_group_says_so() -> None:
    with pytest.raises(ValueError, match="process_group is None and there is no default group: call init_pro"):
        connect(GAFState(), None)


def test_a_state_that_filters_no_parameters_has_no_step_to_advance() -> None:
    with pytest.raises(RuntimeError, match="other ways know by themselves when a step ends"):
        GAFState().advance()
