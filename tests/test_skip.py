"""skip_on_disagreement on states that were given their decision: what it costs, touches, and leaves alone."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from gaf_ddp import GAFState, skip_on_disagreement
from gaf_ddp.monitor.records import Decision
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.neighborhood import NeighborhoodAgreement
from tests.nets import Probe
from tests.syncs import HostSyncs

SIZES = [30, 7]
FUSED: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, fused=True),
    "sgd nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adam amsgrad": partial(Adam, amsgrad=True, fused=True),
    "adamw": partial(AdamW, fused=True),
}


def moved(module: Probe, before: Probe) -> list[bool]:
    """Return for each parameter whether it is another than before."""
    return [not torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True)]


def decided(module: Probe, agreed: bool, scope: str = "model") -> GAFState:
    """Return a state that has just decided on all of the module's parameters."""
    state = GAFState(tau=0.5, scope=scope)  # type: ignore[arg-type]
    decision = decide(torch.ones(2, 2) if agreed else torch.eye(2), NeighborhoodAgreement(0.5), None)
    state._records.decisions = [Decision(decision, list(module.parameters()))]
    return state


def skip(optimizer: Optimizer, state: GAFState) -> Callable[[], None]:
    """Register the skip as if before the state's last backward, whose decisions it follows then."""
    undo = skip_on_disagreement(optimizer, state)
    state._records.followers[-1](state._records.decisions)
    return undo


def step_with_gradients(optimizer: Optimizer, module: Probe) -> list[str]:
    """Step with gradients of one; return what waited for the device."""
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with HostSyncs() as syncs:
        optimizer.step()
    return syncs.calls


class TestHostSyncs:
    @pytest.mark.parametrize("name", FUSED)
    @pytest.mark.parametrize("agreed", [True, False])
    def test_fused_optimizers_do_not_wait_in_model_scope(self, name: str, agreed: bool) -> None:
        probe = Probe(SIZES)
        optimizer = FUSED[name](probe.parameters())
        step_with_gradients(optimizer, probe)  # SGD's momentum exists from here on
        without = step_with_gradients(optimizer, probe)
        skip(optimizer, decided(probe, agreed))
        before = copy.deepcopy(probe)
        assert step_with_gradients(optimizer, probe) == without == []
        assert all(p.grad is not None for p in probe.parameters())
        assert moved(probe, before) == [agreed] * len(SIZES)

    @pytest.mark.parametrize("scope", ["bucket", "model"])
    def test_others_wait_once(self, scope: str) -> None:
        probe = Probe(SIZES)
        optimizer = SGD(probe.parameters(), lr=0.1)
        skip(optimizer, decided(probe, False, scope))
        assert len(step_with_gradients(optimizer, probe)) == 1


class TestWhatIsBorrowed:
    def test_is_put_back(self) -> None:
        probe = Probe(SIZES)
        optimizer: Any = AdamW(probe.parameters(), fused=True)
        skip(optimizer, decided(probe, False))
        step_with_gradients(optimizer, probe)
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(4.0)
        mine = optimizer.found_inf, optimizer.grad_scale
        step_with_gradients(optimizer, probe)
        assert (optimizer.found_inf, optimizer.grad_scale) == mine
        assert optimizer.found_inf.item() == 0

    def test_an_overflow_stays_one(self) -> None:
        probe = Probe(SIZES)
        optimizer: Any = AdamW(probe.parameters(), fused=True)
        skip(optimizer, decided(probe, True))
        before = copy.deepcopy(probe)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
        step_with_gradients(optimizer, probe)
        assert not any(moved(probe, before))


def test_before_the_first_decision_steps_are_taken() -> None:
    probe = Probe(SIZES)
    before = copy.deepcopy(probe)
    optimizer = SGD(probe.parameters(), lr=0.1)
    skip_on_disagreement(optimizer, GAFState())
    step_with_gradients(optimizer, probe)
    assert all(moved(probe, before))


@pytest.mark.parametrize("make", [partial(SGD, lr=0.1), FUSED["sgd"], FUSED["adamw"]])
def test_parameters_the_hook_did_not_judge_are_stepped(make: Any) -> None:
    judged, other = Probe(SIZES), Probe([5])
    before = copy.deepcopy(judged), copy.deepcopy(other)
    optimizer = make([*judged.parameters(), *other.parameters()])
    skip(optimizer, decided(judged, False))
    other.parts[0].grad = torch.ones(5)
    step_with_gradients(optimizer, judged)
    assert not any(moved(judged, before[0]))
    assert all(moved(other, before[1]))


def test_undo_leaves_nothing_behind() -> None:
    probe = Probe(SIZES)
    optimizer = SGD(probe.parameters(), lr=0.1)
    skip(optimizer, decided(probe, False))()
    before = copy.deepcopy(probe)
    step_with_gradients(optimizer, probe)
    assert all(moved(probe, before))


class Wrapper(Optimizer):
    """As Accelerate's: an Optimizer by class, which has not an Optimizer's hooks but holds one that has them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        raise AssertionError("not asked for")

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("wraps", [1, 2])
def test_wrapped_optimizers_skip_too_and_undo_works_twice(wraps: int) -> None:
    probe = Probe(SIZES)
    before = copy.deepcopy(probe)
    optimizer: Optimizer = SGD(probe.parameters(), lr=0.1, momentum=0.9)
    for _ in range(wraps):
        optimizer = Wrapper(optimizer)
    state = decided(probe, False)
    undo, again = skip(optimizer, state), skip(optimizer, state)
    step_with_gradients(optimizer, probe)
    assert not any(moved(probe, before))
    undo()
    undo()
    step_with_gradients(optimizer, probe)
    assert not any(moved(probe, before))  # the other one still holds
    again()
    step_with_gradients(optimizer, probe)
    assert all(moved(probe, before))


def test_refuses_what_is_no_optimizer_or_state() -> None:
    probe = Probe(SIZES)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, found Probe"):
        skip_on_disagreement(probe, GAFState())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state must be a GAFState, found dict"):
        skip_on_disagreement(SGD(probe.parameters(), lr=0.1), {})  # type: ignore[arg-type]
