"""The late hook beside what torch has for training: scalers, optimizers, compilers, dtypes, several models."""

import copy
import pickle
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import (
    _hook_then_optimizer,
    _OptimizerHookState,
)
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from gaf_ddp import GAFState, gaf_hook
from tests.marks import job_but
from tests.nets import assert_replicas_equal, batches, ddp, flat_gradients, flat_parameters, mlp

with warnings.catch_warnings():  # torch 2.11 deprecates what these modules of its own use
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.optim.utils import as_functional_optim

Ranks = Callable[..., list[Any]]

TINY = {"bucket_cap_mb": 0.001}  # several buckets


def filtered(
    device: torch.device, model: nn.Module | None = None, settings: dict[str, Any] | None = None, **options: Any
) -> tuple[nn.Module, GAFState]:
    """Return a model under DDP with the hook, and its state."""
    wrapped, state = ddp(model or mlp(), device, **{**TINY, **options}), GAFState(**(settings or {}))
    wrapped.register_comm_hook(state, gaf_hook)
    return wrapped, state


def train_scaled(device: torch.device, dtype: torch.dtype, broken: list[int]) -> list[tuple[float, bool]]:
    """Return the scale after each step, and whether parameters moved, where some ranks overflow in step 4."""
    model, _ = filtered(device)
    optimizer, scaler = AdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler(device.type, init_scale=1024.0)
    seen = []
    for step, (inputs, targets) in enumerate(batches(dist.get_rank(), 7)):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            loss = cross_entropy(model(inputs.to(device)), targets.to(device))
        if step == 4 and dist.get_rank() in broken:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = flat_parameters(model)
        scaler.step(optimizer)
        scaler.update()
        assert_replicas_equal(model)
        seen.append((scaler.get_scale(), not torch.equal(flat_parameters(model), before)))
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_backs_off_where_nobody_is_finite_and_only_there(ranks: Ranks, dtype: torch.dtype) -> None:
    assert ranks(3, train_scaled, dtype, [1]) == [[(1024.0, True)] * 7] * 3
    everyone = [(1024.0, True)] * 4 + [(512.0, False)] + [(512.0, True)] * 2
    assert ranks(3, train_scaled, dtype, [0, 1, 2]) == [everyone] * 3


def train_with_optimizers(device: torch.device) -> None:
    """Sharded states, and steps inside of backward, move as a plain optimizer does."""
    model, _ = filtered(device)
    sharded, _ = filtered(device, gradient_as_bucket_view=True)
    inside, state = ddp(mlp(), device, gradient_as_bucket_view=True, **TINY), GAFState()
    overlapped = _OptimizerHookState(as_functional_optim(SGD, lr=0.1), params=None)
    inside.register_comm_hook(state, _hook_then_optimizer(gaf_hook, overlapped))
    optimizers: list[Any] = [
        SGD(model.parameters(), lr=0.1),
        ZeroRedundancyOptimizer(sharded.parameters(), SGD, lr=0.1),
    ]
    for inputs, targets in batches(dist.get_rank(), 6):
        for each in (model, sharded, inside):
            each.zero_grad()
            cross_entropy(each(inputs), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
        for each in (sharded, inside):
            assert_replicas_equal(each)
            torch.testing.assert_close(flat_parameters(each), flat_parameters(model))
    assert state.step == 6


def test_optimizers_sharded_and_inside_of_backward(gloo_ranks: Ranks) -> None:
    gloo_ranks(3, train_with_optimizers)


def train_compiled(device: torch.device) -> None:
    """Compilers around and inside of DDP change nothing."""
    plain, _ = filtered(device, bucket_cap_mb=1)
    inside, inner = filtered(device, torch.compile(mlp(), backend="aot_eager"), bucket_cap_mb=1)  # type: ignore[arg-type]
    around, outer = filtered(device, bucket_cap_mb=1)
    compiled = torch.compile(around, backend="aot_eager")
    for inputs, targets in batches(dist.get_rank(), 3):
        for model, call in ((plain, plain), (inside, inside), (around, compiled)):
            model.zero_grad()
            cross_entropy(call(inputs), targets).backward()
            assert_replicas_equal(model)
            torch.testing.assert_close(flat_gradients(model), flat_gradients(plain))
    assert (inner.step, outer.step) == (3, 3)


def test_compiled_models(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, train_compiled)


class Odd(nn.Module):
    """Tied weights, a parameter of no elements and one of no dimension."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(12, 12, dtype=dtype) for _ in range(2))
        self.second.weight = self.first.weight
        self.empty, self.scalar = nn.Parameter(torch.zeros(0, dtype=dtype)), nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x) * self.scalar) + self.empty.sum()
        return out.abs().square().sum()


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.to(torch.complex128)


def train_odd(device: torch.device, dtype: torch.dtype, turned: int | None) -> float:
    """Return how far gradients of the last step are off the mean of those that count, relatively."""
    model, state = filtered(device, Odd(dtype))
    own = Odd(dtype)
    for inputs, _ in batches(dist.get_rank(), 9, size=64):
        sign = -1 if dist.get_rank() == turned else 1
        for each in (model, own):
            each.zero_grad()
            (sign * each(inputs.to(dtype))).backward()
        assert state.agreement is not None
    found, gradient = (
        torch.cat([torch.view_as_real(gradient_of(p)).flatten() for p in each.parameters()]) for each in (model, own)
    )
    everyone = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, gradient)
    counts = [rank for rank in range(len(everyone)) if rank != turned]
    mean = torch.stack([everyone[rank] for rank in counts]).mean(0)
    return ((found - mean).abs().max() / mean.abs().max()).item()


DTYPES = {torch.complex64: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.03, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [None, 1])
def test_dtypes_tied_weights_and_empty_parameters(gloo_ranks: Ranks, dtype: torch.dtype, turned: int | None) -> None:
    assert max(gloo_ranks(4, train_odd, dtype, turned)) < DTYPES[dtype]


def train_adversaries(device: torch.device) -> tuple[int, int]:
    """Train two models with a state each, one through the other."""
    (maker, of_maker), (critic, of_critic) = filtered(device, mlp(0)), filtered(device, nn.Linear(5, 1))
    make, judge = SGD(maker.parameters(), lr=0.1), SGD(critic.parameters(), lr=0.1)
    for inputs, _ in batches(dist.get_rank(), 6):
        judge.zero_grad()
        (critic(maker(inputs).detach()).mean() - critic(torch.randn(6, 5)).square().mean()).backward()
        judge.step()
        make.zero_grad()
        critic.requires_grad_(False)
        critic(maker(inputs)).mean().neg().backward()
        critic.requires_grad_(True)
        make.step()
        for model in (maker, critic):
            assert_replicas_equal(model)
    return of_maker.step, of_critic.step


def test_two_models_with_a_state_each(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(3, train_adversaries) == [(6, 6)] * 3


def copy_and_load(device: torch.device, every: int | None) -> tuple[list[int], list[str]]:
    """Return the steps and the warnings where a state is copied and loaded in the midst of ballots."""
    model, state = filtered(device, settings={"judge_every": every})
    optimizer, steps, held = SGD(model.parameters(), lr=0.1), [], state.state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, (inputs, targets) in enumerate(batches(dist.get_rank(), 14)):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            assert_replicas_equal(model)
            if step % 3 == 0:
                assert copy.deepcopy(state).step == pickle.loads(pickle.dumps(state)).step == state.step
                assert_replicas_equal(copy.deepcopy(model))  # as an average of the model's weights begins
            if step == 6:
                held = state.state_dict()
            if step == 9:
                state.load_state_dict(held)
            steps.append(state.step)
    return steps, [str(each.message) for each in caught]


@pytest.mark.parametrize("every", [None, 4])
def test_a_state_is_copied_in_silence_and_loaded_while_training(gloo_ranks: Ranks, every: int | None) -> None:
    assert gloo_ranks(3, copy_and_load, every) == [([*range(1, 10), 7, 8, 9, 10, 11], [])] * 3


def train_at_unlike_paces(device: torch.device) -> int:
    model, state = filtered(device)
    pace = random.Random(dist.get_rank())
    for inputs, targets in batches(dist.get_rank(), 12):
        time.sleep(0.1 * (pace.random() < 0.3))
        loss = cross_entropy(model(inputs), targets)
        time.sleep(0.1 * (pace.random() < 0.3))
        loss.backward()
    return state.step


def test_ranks_at_unlike_paces(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(3, train_at_unlike_paces) == [12] * 3


def make_groups_anew(device: torch.device) -> int:
    """Return the steps over groups that come and go, and over pairs of ranks that are not neighbours."""
    steps = 0
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    for group in (dist.new_group(), pairs[dist.get_rank() % 2], dist.new_group()):
        assert isinstance(group, dist.ProcessGroup)
        state = GAFState(group)
        model = ddp(mlp(), device, process_group=group)
        model.register_comm_hook(state, gaf_hook)
        for inputs, targets in batches(dist.get_rank(), 3):
            cross_entropy(model(inputs), targets).backward()
        assert_replicas_equal(model, group)
        steps += state.step
        dist.destroy_process_group(group)
    return steps


def test_groups_come_and_go(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(4, make_groups_anew) == [9] * 4


class Branches(nn.Module):
    """Layers of which any may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(nn.Linear(12, 12) for _ in range(5)), nn.Linear(12, 5)

    def forward(self, x: Tensor, used: list[bool]) -> Tensor:
        for layer, is_used in zip(self.layers, used, strict=True):
            x = layer(x).tanh() if is_used else x
        out: Tensor = self.head(x)
        return out


def train_any_way(
    device: torch.device, seed: int, steps: int, settings: dict[str, Any], options: dict[str, Any]
) -> int:
    """Train over random accumulation, unused and frozen layers, NaN and bursts; return steps seen."""
    model, state = filtered(device, Branches(), settings, find_unused_parameters=True, bucket_cap_mb=0.0005, **options)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    alike = random.Random(seed)
    own = random.Random(seed if "skip_all_reduce_unused_params" in options else 100 * seed + dist.get_rank())
    for inputs, targets in batches(dist.get_rank(), steps):

        def loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            return cross_entropy(model(inputs, [own.random() < 0.6 for _ in range(5)]), targets)

        optimizer.zero_grad()
        if alike.random() < 0.1:
            for layer in model.module.layers:  # type: ignore[union-attr]
                layer.requires_grad_(alike.random() < 0.7)
        # Under skip_all_reduce_unused_params torch leaves what only an accumulated backward used to each rank.
        for _ in range(0 if "skip_all_reduce_unused_params" in options else alike.choice([0, 0, 1, 2])):
            with model.no_sync():  # type: ignore[operator]
                loss().backward()
        (loss() * own.choices([1, torch.nan, 1e4], [94, 3, 3])[0]).backward()
        if not flat_gradients(model).isnan().any():
            optimizer.step()
        assert_replicas_equal(model)
    return state.step


WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"judge_every": 3}, {"gradient_as_bucket_view": True}),
    ({"check_every": 2, "judge_every": 4, "wire_dtype": torch.bfloat16}, {}),
    ({"check_every": 3}, {"skip_all_reduce_unused_params": True}),
    ({"watch": True}, {}),
    ({"tau": 1.0}, {}),
]


@pytest.mark.parametrize(("settings", "options"), job_but(*WAYS[:3:2], of=WAYS))
def test_replicas_are_the_same_whatever_steps_are_made_of(
    gloo_ranks: Ranks, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    steps = 60
    assert gloo_ranks(3, train_any_way, len(str(settings)), steps, settings, options) == [steps] * 3
