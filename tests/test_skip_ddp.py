"""skip_on_disagreement under DDP: a step on which nothing agreed never happened, for every optimizer."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement
from tests.marks import job_but
from tests.nets import Probe, assert_replicas_equal, ddp

Ranks = Callable[..., list[Any]]
Make = Callable[[Iterable[Tensor]], Optimizer]

SIZES = [30, 7]
AGREED = [False, True, False, False, True, True, False, True]  # also the very first step is left out

MOMENTUM: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.1, weight_decay=0.1),
    "sgd momentum": partial(SGD, **MOMENTUM),
    "sgd nesterov": partial(SGD, nesterov=True, **MOMENTUM),
    "sgd nesterov foreach": partial(SGD, nesterov=True, foreach=True, **MOMENTUM),
    "sgd fused": partial(SGD, lr=0.1, weight_decay=0.1, fused=True),
    "sgd nesterov fused": partial(SGD, nesterov=True, fused=True, **MOMENTUM),
    "adam": partial(Adam, lr=0.1, weight_decay=0.1),
    "adam amsgrad fused": partial(Adam, lr=0.1, amsgrad=True, fused=True),
    "adamw": partial(AdamW, lr=0.1),
    "adamw foreach": partial(AdamW, lr=0.1, foreach=True),
    "adamw fused": partial(AdamW, lr=0.1, fused=True),
    "adagrad": partial(Adagrad, lr=0.1, weight_decay=0.1),
    "adagrad fused": partial(Adagrad, lr=0.1, weight_decay=0.1, fused=True),
}


def gradient_of(step: int) -> Tensor:
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(step))


def assert_same_state(optimizer: Optimizer, reference: Optimizer) -> None:
    """Assert equal state to the bit, where none at all and all zeros are the same."""
    for group, expected in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for p, q in zip(group["params"], expected["params"], strict=True):
            state, wanted = optimizer.state.get(p, {}), reference.state.get(q, {})
            for key in {*state, *wanted}:
                found, right = state.get(key), wanted.get(key)
                if found is None or right is None:
                    assert not torch.as_tensor(0 if found is None else found).any(), key
                    assert not torch.as_tensor(0 if right is None else right).any(), key
                else:
                    assert torch.equal(torch.as_tensor(found), torch.as_tensor(right)), key


def assert_same_parameters(module: nn.Module, reference: nn.Module) -> None:
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def train(device: torch.device, name: str, scope: str, scaled: bool) -> None:
    """Take the steps of AGREED, and compare with an optimizer that only ever sees those that agreed."""
    probe = Probe(SIZES).to(device)
    other = copy.deepcopy(probe)
    model = ddp(probe, device)
    state = GAFState(tau=1.0, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    optimizer, reference = OPTIMIZERS[name](probe.parameters()), OPTIMIZERS[name](other.parameters())
    skip_on_disagreement(optimizer, state)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=1000, enabled=scaled)
    for step, agreed in enumerate(AGREED):
        gradient = gradient_of(step).to(device)
        optimizer.zero_grad()
        sign = -1 if dist.get_rank() == 1 and not agreed else 1
        scaler.scale(model(sign * gradient)).backward()
        scaler.step(optimizer)
        scaler.update()
        if agreed:
            other.zero_grad()
            other(gradient).backward()
            reference.step()
        assert_same_parameters(probe, other)
        assert_same_state(optimizer, reference)
        assert_replicas_equal(probe)
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")
    assert scaler.get_scale() == (256.0 if scaled else 1.0)  # disagreement is no overflow


def exists(device: torch.device, name: str) -> bool:
    """Return whether this torch has the optimizer on the device: fused Adagrad is young on GPUs."""
    try:
        OPTIMIZERS[name]([torch.zeros(1, device=device, requires_grad=True)])
    except RuntimeError:
        return device.type == "cpu"
    return True


def train_all(device: torch.device, name: str) -> bool:
    """Return whether there was an optimizer to train with."""
    if not exists(device, name):
        return False
    for scope in ("bucket", "model"):
        for scaled in (False, True):
            train(device, name, scope, scaled)
    return True


@pytest.mark.parametrize("name", job_but("sgd", "sgd nesterov", "adamw fused", of=OPTIMIZERS))
def test_a_step_without_agreement_never_happened(ranks: Ranks, name: str) -> None:
    if not all(ranks(2, train_all, name)):
        pytest.skip(f"this torch has no {name} on GPUs")


def train_with_closure(device: torch.device, scope: str, make: Make, as_keyword: bool) -> None:
    """The same with a closure: the decision is taken in the backward inside the step."""
    probe = Probe(SIZES).to(device)
    other = copy.deepcopy(probe)
    model = ddp(probe, device)
    state = GAFState(tau=1.0, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    optimizer, reference = make(probe.parameters()), make(other.parameters())
    skip_on_disagreement(optimizer, state)

    def closure_of(module: nn.Module, of: Optimizer, gradient: Tensor) -> Callable[[], Any]:
        def closure() -> Any:
            of.zero_grad()
            loss = module(gradient)
            loss.backward()
            return loss

        return closure

    for step, agreed in enumerate(AGREED):
        gradient = gradient_of(step).to(device)
        sign = -1 if dist.get_rank() == 1 and not agreed else 1
        closure = closure_of(model, optimizer, sign * gradient)
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss is not None
        if agreed:
            reference.step(closure_of(other, reference, gradient))
        assert_same_parameters(probe, other)


@pytest.mark.parametrize("scope", job_but("model", of=["bucket", "model"]))
@pytest.mark.parametrize(
    "make", [partial(LBFGS, lr=0.1, max_iter=3), OPTIMIZERS["sgd nesterov"], OPTIMIZERS["adamw fused"]]
)
def test_closures_are_left_out_too(ranks: Ranks, scope: str, make: Make) -> None:
    for as_keyword in (False, True):
        ranks(2, train_with_closure, scope, make, as_keyword)


def train_three_buckets(device: torch.device, name: str) -> None:
    """Bucket scope, a bucket for each of three parameters: in step s the one numbered s % 4 disagrees, if any."""
    sizes = [40, 50, 60]
    probe = Probe(sizes).to(device)
    other = copy.deepcopy(probe)
    model = ddp(probe, device, bucket_cap_mb=0.0001)
    state = GAFState(tau=1.0)
    model.register_comm_hook(state, gaf_hook)
    model(torch.ones(150, device=device)).backward()  # DDP makes its buckets anew after this
    optimizer, reference = OPTIMIZERS[name](probe.parameters()), OPTIMIZERS[name](other.parameters())
    skip_on_disagreement(optimizer, state)
    if name == "sgd nesterov fused":  # torch's takes first steps for all parameters or none, else it raises
        reference.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in other.parameters()})
    for step in range(8):
        gradients = [torch.randn(size, generator=torch.Generator().manual_seed(step)) for size in sizes]
        optimizer.zero_grad()
        signs = [-1 if dist.get_rank() == 1 and i == step % 4 else 1 for i in range(3)]
        model(torch.cat([s * g for s, g in zip(signs, gradients, strict=True)]).to(device)).backward()
        assert len(state.decisions) == 3
        optimizer.step()
        for i, p in enumerate(other.parts):
            p.grad = None if i == step % 4 else gradients[i].to(device)
        reference.step()
        assert_same_parameters(probe, other)
        assert_same_state(optimizer, reference)


BY_BUCKET = ["sgd nesterov", "sgd nesterov fused", "adamw", "adamw fused", "adagrad"]


@pytest.mark.parametrize("name", job_but("sgd nesterov", "adamw fused", of=BY_BUCKET))
def test_bucket_scope_leaves_out_the_buckets_that_disagreed(ranks: Ranks, name: str) -> None:
    ranks(2, train_three_buckets, name)


class ByTurns(nn.Module):
    """Two losses, each on a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in (40, 50))

    def forward(self, part: int, gradient: Tensor) -> Tensor:
        loss: Tensor = (self.parts[part] * gradient).sum()
        return loss


def take_two_backwards(device: torch.device, scope: str, name: str) -> None:
    """Two synchronised backwards before a step: first a loss on which ranks disagree, or the other way round."""
    for order in ([0, 1], [1, 0], [0, 1, 0, 1]):
        module = ByTurns().to(device)
        model = ddp(module, device, find_unused_parameters=True, bucket_cap_mb=0.0001)
        state = GAFState(tau=0.5, scope=scope)  # type: ignore[arg-type]
        model.register_comm_hook(state, gaf_hook)
        optimizer = OPTIMIZERS[name](module.parameters())
        skip_on_disagreement(optimizer, state)
        for part in (0, 1):  # all agree: momentum, and buckets made anew
            model(part, torch.ones_like(module.parts[part])).backward()
        optimizer.step()
        other = copy.deepcopy(module)
        reference = OPTIMIZERS[name](other.parameters())
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(2):
            optimizer.zero_grad()
            for part in order:
                sign = -1 if part == 0 and dist.get_rank() == 1 else 1
                model(part, sign * torch.ones_like(module.parts[part])).backward()
            optimizer.step()
            other.parts[0].grad = None
            other.parts[1].grad = torch.full_like(other.parts[1], order.count(1))
            reference.step()
            assert_same_parameters(module, other)
            assert_same_state(optimizer, reference)
            assert_replicas_equal(module)


@pytest.mark.parametrize("name", ["sgd nesterov", "adamw fused"])
@pytest.mark.parametrize("scope", ["bucket", "model"])
def test_after_two_backwards_each_parameter_goes_by_those_that_made_its_gradient(
    ranks: Ranks, scope: str, name: str
) -> None:
    ranks(2, take_two_backwards, scope, name)
