"""filter_parameters: what it makes of gradients in every case, and what it refuses. Engines: tests/frameworks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp import GAFState, filter_parameters, gaf_hook
from gaf_ddp.engines.parameters import _Parameters
from tests.engines.engines import assert_filtered, by_hand
from tests.gradients import agreeing_gradients
from tests.nets import Probe, ddp, flat_gradients, mlp, world

Ranks = Callable[..., list[Any]]
SIZES = [300, 11, 200]
N = sum(SIZES)


def alike(world_size: int, steps: int) -> Tensor:
    return torch.stack([agreeing_gradients(world_size, N, seed) for seed in range(steps)])


def average(probe: Probe) -> Tensor:
    """Average as an engine does; return the gradients `(N,)` float64."""
    for parameter in probe.parts:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    return flat_gradients(probe)


def run(gradients: Tensor, state: GAFState, each_step: Callable[[int], None] | None = None) -> Tensor:
    """Take steps of given gradients `(steps, W, N)`; return what the engine has of them, `(steps, N)` float64."""
    probe, found = Probe(SIZES), []
    undo = filter_parameters(probe.parameters(), state)
    for step, of_ranks in enumerate(gradients):
        if each_step is not None:
            each_step(step)
        probe.zero_grad()
        probe(of_ranks[dist.get_rank()]).backward()
        found.append(average(probe))
        state.advance()
        assert state.step == step + 1
    undo()
    return torch.stack(found)


def assert_mean(found: Tensor, gradients: Tensor, ranks: list[int], to: float = 1e-6) -> None:
    expected = gradients[ranks].double().mean(0)
    assert (found - expected).norm() <= to * expected.norm()


def loop(device: torch.device) -> None:
    assert_filtered(by_hand)


def test_a_loop_by_hand(gloo_ranks: Ranks) -> None:
    gloo_ranks(4, loop)


def cases(device: torch.device) -> None:
    """One thing after another, on the same four ranks."""
    for case in (turned, not_finite, nobody_finite, long, watched, started_late, seldom, by_hosts, resumed):
        case()


def turned() -> None:
    gradients = alike(4, 6)
    gradients[:, 2] *= -1
    state = GAFState(check_every=2)
    found = run(gradients, state)
    assert_mean(found[0], gradients[0], [0, 1, 2, 3])
    for step in range(1, 6):
        assert_mean(found[step], gradients[step], [0, 1, 3])
    assert [id(each) for each in state.decisions[0].parameters]
    summary = state.summary()
    assert summary["gaf/kept_rank_02"] < 0.35, summary


def not_finite() -> None:
    """Zeros at once, from the first parameter that is not finite on."""
    gradients = alike(4, 5)
    gradients[2, 1, 3] = math.nan
    gradients[3, 1, N - 1] = math.inf
    state = GAFState()
    found = run(gradients, state)
    assert found.isfinite().all()
    assert state.summary()["gaf/nonfinite_fraction"] == 2 / 20
    # The engine divides by W all the same. Autograd reached the last parameter first, or the first one: both are right.
    part = slice(N - SIZES[-1], N)
    expected = gradients[3, [0, 2, 3]].double().sum(0)[part] / 4
    assert (found[3, part] - expected).norm() <= 1e-6 * expected.norm()
    assert_mean(found[4], gradients[4], [0, 1, 2, 3])


def nobody_finite() -> None:
    """What is not finite passes after a step in which all ranks had it: a loss scale must back off."""
    gradients = alike(4, 5)
    gradients[1:3, :, 3] = math.inf
    found = run(gradients, GAFState())
    assert found[1].isfinite().all()
    assert not found[2].isfinite().all()
    assert_mean(found[4], gradients[4], [0, 1, 2, 3])


def long() -> None:
    """A gradient a thousand times as long is shortened to a few times the limit at once, and out then."""
    gradients = alike(4, 5)
    gradients[2:, 3] *= 1000
    found = run(gradients, GAFState(max_norm_ratio=2.0))
    assert (4 * found[2] - gradients[2, :3].double().sum(0)).norm() < 12 * gradients[1, 3].norm()
    assert_mean(found[4], gradients[4], [0, 1, 2])


def watched() -> None:
    gradients = alike(4, 5)
    gradients[:, 0] *= -1
    state = GAFState(watch=True)
    plain = torch.stack([run(each[None], GAFState())[0] for each in gradients])  # the first step of each
    found = run(gradients, state, lambda step: setattr(state, "watch", step < 3))
    assert torch.equal(found[:3], plain[:3])
    assert_mean(found[3], gradients[3], [1, 2, 3])


def started_late() -> None:
    gradients = alike(4, 5)
    gradients[:, 0] *= -1
    found = run(gradients, GAFState(start_step=3))
    assert_mean(found[2], gradients[2], [0, 1, 2, 3])
    assert_mean(found[3], gradients[3], [1, 2, 3])


def seldom() -> None:
    gradients = alike(4, 8)
    gradients[:, 1] *= -1
    found = run(gradients, GAFState(judge_every=3))
    assert_mean(found[2], gradients[2], [0, 1, 2, 3])
    assert_mean(found[3], gradients[3], [0, 2, 3])


def by_hosts() -> None:
    state = GAFState(voters="host")  # one host: nobody to compare it with
    assert_mean(run(alike(4, 3), state)[2], alike(4, 3)[2], [0, 1, 2, 3])


def resumed() -> None:
    gradients = alike(4, 8)
    gradients[:, 3] *= -1
    whole = run(gradients, GAFState())
    first, second = GAFState(), GAFState()
    run(gradients[:4], first)
    second.load_state_dict(first.state_dict())
    second.step = 0
    found = run(gradients[4:], second)
    assert torch.equal(found, whole[4:])


def test_every_case(gloo_ranks: Ranks) -> None:
    gloo_ranks(4, cases)


class Branches(nn.Module):
    """Two layers, which ranks go through in another order; one of them is used by even ranks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers if dist.get_rank() % 2 else [self.layers[i] for i in (1, 0, 2)]
        x = second(first(x))
        return x if dist.get_rank() % 2 else third(x)


def orders(device: torch.device) -> None:
    """Hooks fire in any order, and several times a step; ballots say the same whatever the order is."""
    model, state, sketches = Branches(), GAFState(), []
    filter_parameters(model.parameters(), state)
    for step in range(3):
        for _ in range(2):
            model(torch.randn(4, 12, generator=torch.Generator().manual_seed(step))).sum().backward()
        assert isinstance(state._way, _Parameters)
        sketches.append(state._way._late.ballot.sketch.clone())
        state.advance()
    assert state.step == 3
    assert state.agreement is not None
    assert state.agreement.kept.all()
    whole = torch.cat([torch.zeros(0) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    norm = torch.stack(sketches).sum(0).double().norm()
    assert abs(norm / whole.double().norm() - 1) < 0.1


def test_hooks_fire_in_any_order_and_several_times(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, orders)


def optimizer(device: torch.device) -> None:
    """An optimizer ends steps, whatever is wrapped around it; undone, it no longer does."""

    class Wrapped(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.optimizer = inner

    model, state = mlp(), GAFState()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    undo = filter_parameters(model.parameters(), state, advance_with=Wrapped(inner))
    with pytest.raises(ValueError, match=r"state must be new, found one that filters a model already"):
        filter_parameters(model.parameters(), state)
    for step in range(3):
        model(torch.randn(4, 12)).sum().backward()
        inner.step()
        assert state.step == step + 1
    undo()
    undo()
    model(torch.randn(4, 12)).sum().backward()
    inner.step()
    assert state.step == 3
    with pytest.raises(RuntimeError, match=r"advance\(\) is for filter_parameters"):
        state.advance()
    filter_parameters(model.parameters(), state)
    wrapped = ddp(mlp(), device)
    wrapped.register_comm_hook(state, gaf_hook)
    loss = wrapped(torch.randn(4, 12)).sum()
    with pytest.raises(ValueError, match=r"found one that filters another"):
        loss.backward()


def errors(device: torch.device) -> None:
    """What cannot work is said at once, or in the first step."""
    own = list(mlp().parameters())
    for wrong in (mlp(), own[0], ["a"]):
        with pytest.raises(TypeError, match=r"parameters must be tensors"):
            filter_parameters(wrong, GAFState())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state must be a GAFState, found int"):
        filter_parameters(own, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer"):
        filter_parameters(own, GAFState(), advance_with=3)  # type: ignore[arg-type]
    for found in ([], [nn.Parameter(torch.ones(1), requires_grad=False)]):
        with pytest.raises(ValueError, match=r"parameters must hold some that require gradients"):
            filter_parameters(found, GAFState())
    with pytest.raises(ValueError, match=r"consensus rule alone: leave tau and weighting None, found 0.9"):
        filter_parameters(own, GAFState(tau=0.9))
    with pytest.raises(ValueError, match=r"wire_dtype must be None.*found torch.bfloat16"):
        filter_parameters(own, GAFState(wire_dtype=torch.bfloat16))
    other: Any = dist.new_group()
    with pytest.raises(ValueError, match=r"process_group must be the state's"):
        filter_parameters(own, GAFState(other), world())
    with pytest.raises(ValueError, match=r"parameters must be the same on every rank"):
        filter_parameters(own[: len(own) - dist.get_rank()], GAFState())
    table = nn.Embedding(9, 3, sparse=True)
    filter_parameters(table.parameters(), GAFState())
    with pytest.raises(TypeError, match=r"must be dense"):
        table(torch.tensor([1, 2])).sum().backward()
    model = mlp()
    filter_parameters(model.parameters(), GAFState())
    with pytest.raises(RuntimeError, match=r"create_graph=True"):
        model(torch.randn(4, 12)).square().sum().backward(create_graph=True)
    model, state = mlp(), GAFState()
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]  # as ZeRO 3 marks them
    filter_parameters(model.parameters(), state)
    with pytest.raises(RuntimeError, match=r"reference needs whole parameters, found parts of them"):
        state.reference(lambda t: model(torch.randn(4, 12)).sum() / t)
    fused()


def fused() -> None:
    """Gradient accumulation fusion, as Megatron has it, writes main_grad by itself."""
    state, model = GAFState(), mlp()
    filter_parameters(model.parameters(), state)
    for parameter in model.parameters():
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"found 8 of 8 with one that no hook saw.*fusion"):
        state.advance()
    state, model = GAFState(), mlp()
    filter_parameters(model.parameters(), state)
    own: Any = model[0].weight
    own.grad_added_to_main_grad = True
    with pytest.raises(RuntimeError, match=r"turn gradient accumulation fusion off"):
        model(torch.randn(4, 12)).sum().backward()


def test_an_optimizer_ends_steps(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, optimizer)


def test_what_cannot_work_is_refused(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, errors)


def odd(device: torch.device) -> None:
    """Complex, half precision and transposed gradients, and a rank alone."""
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(3, 4, dtype=d)) for d in (torch.complex64, torch.bfloat16, torch.float64)]
    )
    state = GAFState()
    filter_parameters(model.parameters(), state)
    for step in range(3):
        for each in model:
            each.grad = None
        rank = dist.get_rank()
        sum((each.t() * (step + 1)).abs().sum() * (-1 if rank == 2 else 1) for each in model).backward()
        for each in model:
            assert each.grad is not None
            assert (each.grad.dtype, each.grad.shape) == (each.dtype, each.shape)
            factor = 1.0 if not step else 0 if rank == 2 else 3 / 2
            assert torch.allclose(each.grad.abs().double(), torch.full((3, 4), (step + 1) * factor).double(), rtol=1e-2)
        state.advance()


def test_every_kind_of_gradient(gloo_ranks: Ranks) -> None:
    gloo_ranks(3, odd)
