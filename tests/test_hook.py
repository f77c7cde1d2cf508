"""gaf_hook at the edges: spoilt ranks, uneven inputs, GradScaler, schedules, one rank alone."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, NeighborhoodAgreement, SequentialAgreement, gaf_hook, skip_on_disagreement
from tests import oracle
from tests.following import Followed, assert_follows, follow
from tests.gradients import agreeing_gradients, random_gradients
from tests.nets import Probe, assert_replicas_equal, ddp, flat_gradients, flat_parameters

Ranks = Callable[..., list[Any]]

SIZES = [300, 11, 200]
N = sum(SIZES)
TINY = {"bucket_cap_mb": 0.0005}  # one bucket for each parameter

every_scope = pytest.mark.parametrize("scope", ["bucket", "model"])


def agreeing_steps(world_size: int, steps: int) -> Tensor:
    return torch.stack([agreeing_gradients(world_size, N, seed) for seed in range(steps)])


def share(outcome: Followed, *steps: int) -> float:
    """Return how many of all decisions fell in these steps: the first step has one bucket, the others several."""
    return sum(len(outcome.spans[step]) for step in steps) / sum(map(len, outcome.spans))


class TestSpoiltRanks:
    @every_scope
    def test_a_flipped_rank_is_left_out_whichever_it_is(self, ranks: Ranks, scope: str) -> None:
        gradients = agreeing_steps(4, 4)
        for step in range(4):
            gradients[step, step] *= -1
        outcomes = ranks(4, follow, gradients, SIZES, {"tau": 0.9, "scope": scope}, TINY)
        assert_follows(outcomes, gradients, oracle.neighborhood(0.9))
        summary = outcomes[0].summary
        for rank in range(4):
            assert summary[f"gaf/kept_rank_{rank:02d}"] == pytest.approx(1 - share(outcomes[0], rank))
        assert summary["gaf/skipped_fraction"] == 0

    @every_scope
    def test_the_papers_rule_does_not_manage_a_flipped_rank_0(self, ranks: Ranks, scope: str) -> None:
        # Its documented weakness: the first gradient is never questioned.
        gradients = agreeing_steps(4, 2)
        gradients[:, 0] *= -1
        gradients[1, 1] *= -1
        settings = {"weighting": SequentialAgreement(0.9), "scope": scope}
        outcomes = ranks(4, follow, gradients, SIZES, settings, TINY)
        assert_follows(outcomes, gradients, oracle.sequential(0.9))
        summary = outcomes[0].summary
        first, second = share(outcomes[0], 0), share(outcomes[0], 1)
        assert summary["gaf/skipped_fraction"] == first  # nobody agrees with rank 0
        assert [summary[f"gaf/kept_rank_{rank:02d}"] for rank in range(4)] == [second, second, 0, 0]  # the bad two

    @every_scope
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_rank_that_is_not_finite_is_left_out_and_counted(self, ranks: Ranks, scope: str, bad: float) -> None:
        gradients = agreeing_steps(3, 2)
        gradients[1, 2, ::50] = bad  # in every bucket
        for exchange in ("sharded", "gather"):
            settings = {"tau": 2.0, "scope": scope, "exchange": exchange}
            outcomes = ranks(3, follow, gradients, SIZES, settings, TINY)
            assert_follows(outcomes, gradients, oracle.mean)
            assert outcomes[0].summary["gaf/nonfinite_fraction"] == pytest.approx(share(outcomes[0], 1) / 3)
            assert outcomes[0].summary["gaf/kept_rank_02"] == share(outcomes[0], 0)

    @every_scope
    def test_a_rank_at_1000_times_the_norm_is_left_out(self, ranks: Ranks, scope: str) -> None:
        gradients = agreeing_steps(3, 2)
        gradients[:, 1] *= 1000
        settings: dict[str, Any] = {"tau": 0.9, "scope": scope}
        outcomes = ranks(3, follow, gradients, SIZES, settings, TINY)
        assert_follows(outcomes, gradients, oracle.neighborhood(0.9))
        assert outcomes[0].summary["gaf/overlong_fraction"] == pytest.approx(1 / 3)
        assert outcomes[0].summary["gaf/kept_rank_01"] == 0
        # Without the guard its direction passes, and its length decides the result.
        outcomes = ranks(3, follow, gradients, SIZES, settings | {"max_norm_ratio": None}, TINY)
        assert_follows(outcomes, gradients, oracle.neighborhood(0.9), max_norm_ratio=None)
        assert outcomes[0].summary["gaf/kept_rank_01"] == 1

    @every_scope
    def test_copies_agree_and_zero_ranks_are_in_no_divisor(self, ranks: Ranks, scope: str) -> None:
        gradients = random_gradients(1, N)[None].repeat(2, 4, 1)
        gradients[1, 0] = gradients[1, 3] = 0
        outcomes = ranks(4, follow, gradients, SIZES, {"tau": 0.001, "scope": scope}, TINY)
        for filtered in outcomes[0].gradients:
            oracle.assert_close(filtered, gradients[0, 0].double(), 1e-6)
        assert outcomes[0].summary["gaf/zero_fraction"] == share(outcomes[0], 1) / 2

    @every_scope
    def test_what_nobody_agrees_on_is_zero(self, ranks: Ranks, scope: str) -> None:
        one = random_gradients(1, N)
        gradients = torch.cat([one, -one])[None]
        for exchange in ("sharded", "gather"):
            settings = {"tau": 1.0, "scope": scope, "exchange": exchange}
            for outcome in ranks(2, follow, gradients, SIZES, settings, TINY):
                assert not outcome.gradients.any()
                assert outcome.summary["gaf/skipped_fraction"] == 1


def train_unevenly(device: torch.device, gradients: Tensor, inputs: list[int], scope: str) -> tuple[Tensor, int]:
    """Train with DDP's Join: rank r has `inputs[r]` batches; return the parameters and the steps seen."""
    probe = Probe(SIZES)
    model = ddp(probe, device, **TINY)
    state = GAFState(tau=2.0, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    with model.join():
        for step in range(inputs[dist.get_rank()]):
            optimizer.zero_grad()
            model(gradients[step, dist.get_rank()].to(device)).backward()
            optimizer.step()
    assert_replicas_equal(probe)
    return flat_parameters(probe).cpu(), state.step


@every_scope
def test_joined_ranks_are_not_in_the_divisor(ranks: Ranks, scope: str) -> None:
    inputs = [2, 6, 4]
    gradients = torch.stack([random_gradients(3, N, seed) for seed in range(6)])
    expected = flat_parameters(Probe(SIZES))
    for step, of_ranks in enumerate(gradients):
        present = [rank for rank in range(3) if step < inputs[rank]]
        expected -= 0.1 * of_ranks[present].double().mean(0)
    for parameters, steps in ranks(3, train_unevenly, gradients, inputs, scope):
        oracle.assert_close(parameters, expected, 1e-6)
        assert steps == 6


def train_with_overflow(device: torch.device, scope: str, skip: bool, fused: bool) -> dict[str, Any]:
    """Train with a GradScaler: rank 1 overflows at step 1, every rank at step 2; return what happened."""
    probe = Probe(SIZES)
    model = ddp(probe, device, **TINY)
    state = GAFState(tau=1.0, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1, momentum=0.9, fused=fused)
    if skip:
        skip_on_disagreement(optimizer, state)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=100)
    scales, moved, spoilt = [], [], {1: [1], 2: [0, 1, 2]}
    for step in range(4):
        before = flat_parameters(probe)
        optimizer.zero_grad()
        gradient = agreeing_gradients(3, N, step)[dist.get_rank()].to(device)
        if dist.get_rank() in spoilt.get(step, []):
            gradient[::7] = torch.inf
        scaler.scale(model(gradient)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(flat_parameters(probe), before))
        assert_replicas_equal(probe)
    return {"scales": scales, "moved": moved, "summary": state.summary()}


@every_scope
@pytest.mark.parametrize("skip", [False, True])
def test_grad_scaler_backs_off_when_every_rank_overflows(ranks: Ranks, scope: str, skip: bool) -> None:
    for fused in (False, True):
        for found in ranks(3, train_with_overflow, scope, skip, fused):
            assert found["scales"] == [1024, 1024, 512, 512]
            assert found["moved"] == [True, True, False, True]
            # One bucket at first, then three, in bucket scope: 1 and 3 ranks of 3 over steps 1 and 2.
            decisions = 3 * 4 if scope == "model" else 3 * (1 + 2 + 2 + 2)
            counted = (1 + 3) * (1 if scope == "model" else 2)
            assert found["summary"]["gaf/nonfinite_fraction"] == pytest.approx(counted / decisions)


def schedule_steps(device: torch.device) -> list[list[int]]:
    """Return what a schedule was called with, in each of three steps."""
    called: list[list[int]] = [[], [], []]

    def tau(step: int) -> float:
        called[state.step].append(step)
        return 1.5 if step < 2 else 0.5

    model = ddp(Probe([20]), device)
    state = GAFState(tau=tau)
    model.register_comm_hook(state, gaf_hook)
    for step in range(3):
        model.zero_grad()
        x = torch.zeros(20)
        x[dist.get_rank()] = 1.0  # at distance 1 of each other
        model(x.to(device)).backward()
        assert state.agreement is not None
        assert state.agreement.agreed.tolist() == [step < 2]
    return called


def test_a_schedule_is_called_with_the_step(ranks: Ranks) -> None:
    for called in ranks(2, schedule_steps):
        assert [set(steps) for steps in called] == [{0}, {1}, {2}]


def warm_up(device: torch.device) -> list[bool]:
    """Return whether opposite gradients of two ranks passed, over four steps with start_step=2."""
    passed = []
    probe = Probe([20])
    model = ddp(probe, device)
    model.register_comm_hook(GAFState(weighting=NeighborhoodAgreement(0.5), start_step=2), gaf_hook)
    for _ in range(4):
        probe.zero_grad()
        model(torch.full((20,), [1.0, -3.0][dist.get_rank()], device=device)).backward()
        passed.append(flat_gradients(probe).tolist() == [-1.0] * 20)
    return passed


def test_start_step_averages_before_it(ranks: Ranks) -> None:
    assert ranks(2, warm_up) == [[True, True, False, False]] * 2


def train_alone(device: torch.device, settings: dict[str, Any]) -> tuple[bool, list[str]]:
    """Return whether gradients passed unchanged, NaN too, and the warnings of three steps of several buckets."""
    probe = Probe(SIZES)
    model = ddp(probe, device, **TINY)
    model.register_comm_hook(GAFState(**settings), gaf_hook)
    same = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            gradient = random_gradients(1, N, step)[0]
            gradient[3] = [1.0, torch.nan, 0.0][step]
            probe.zero_grad()
            model(gradient.to(device)).backward()
            found = flat_gradients(probe).cpu().float()
            same.append(torch.equal(found, gradient) if step != 1 else bool(found.isnan().any()))
    return all(same), [str(w.message) for w in caught]


@every_scope
def test_one_rank_gets_its_gradient_back_and_one_warning(ranks: Ranks, scope: str) -> None:
    exact: list[dict[str, Any]] = [{}, {"exchange": "gather"}, {"wire_dtype": torch.bfloat16}]
    for settings in ({}, {"wire_dtype": torch.bfloat16}, *({"tau": 0.0, "scope": scope, **each} for each in exact)):
        [(same, messages)] = ranks(1, train_alone, settings)
        assert same
        assert messages == ["gaf_ddp: world size 1, there are no other gradients to filter against"]


@pytest.mark.parametrize(("settings", "said"), [({}, True), ({"watch": True}, True), ({"tau": 0.9}, False)], ids=str)
def test_two_ranks_are_warned_once_of_a_rule_that_needs_three(
    ranks: Ranks, settings: dict[str, Any], said: bool
) -> None:
    message = "gaf_ddp: world size 2, two ranks cannot outvote each other: the consensus rule leaves one out from three"
    [(_, first), (_, second)] = ranks(2, train_alone, settings)
    assert first == ([f"{message} ranks on"] if said else [])
    assert second == []


@pytest.mark.parametrize("state", [None, GAFState, 0.9])
def test_refuses_what_is_no_state(state: Any) -> None:
    with pytest.raises(TypeError, match=r"state must be a GAFState, found .*; register_comm_hook\(GAFState\(\)"):
        gaf_hook(state, None)


def test_refuses_what_is_no_bucket() -> None:
    with pytest.raises(TypeError, match=r"bucket must be a torch.distributed.GradBucket, found tuple"):
        gaf_hook(GAFState(), (torch.ones(2), None))
