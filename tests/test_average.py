"""filter_average: whom it leaves out of a round, in the same round, and what it makes of the others' tensors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp import GAFState, filter_average, gaf_hook
from tests.gradients import agreeing_gradients
from tests.nets import Probe, ddp, mlp

Ranks = Callable[..., list[Any]]
SIZES = [300, 11, 200]
N = sum(SIZES)


def average(gradients: Tensor, state: GAFState) -> Tensor:
    """Return the average `(N,)` float64 of three tensors of other shapes; all ranks have its bits."""
    parts = [each.clone() for each in gradients[dist.get_rank()].split(SIZES)]
    parts[2] = parts[2].view(20, 10).t()
    filter_average(parts, state)
    parts[2] = parts[2].t().reshape(-1)
    found = torch.cat(parts)
    first = found.clone()
    dist.broadcast(first, 0)
    assert torch.equal(found.nan_to_num(9), first.nan_to_num(9))
    return found.double()


def assert_mean(found: Tensor, gradients: Tensor, ranks: list[int], to: float = 1e-6) -> None:
    expected = gradients[ranks].double().mean(0)
    assert (found - expected).norm() <= to * expected.norm()


def cases(device: torch.device) -> None:
    for case in (turned, broken, long, nobody, watched, travelling, resumed, mixed):
        case()


def turned() -> None:
    """A rank that turns is left out of the round that it turns in, once others are known."""
    state = GAFState(momentum=0.9)
    for step in range(6):
        gradients = agreeing_gradients(4, N, step)
        gradients[1] *= -1
        assert_mean(average(gradients, state), gradients, [0, 2, 3])
        assert state.step == step + 1
        assert state.agreement is not None
        assert state.agreement.kept.tolist() == [True, False, True, True]
    state = GAFState(momentum=0.9)
    assert_mean(average(agreeing_gradients(4, N), state), agreeing_gradients(4, N), [0, 1, 2, 3])


def broken() -> None:
    gradients = agreeing_gradients(4, N)
    gradients[2, 5] = math.nan
    assert_mean(average(gradients, GAFState()), gradients, [0, 1, 3])


def long() -> None:
    """In the first round nobody is out, and who is long is shortened by this round's own norms."""
    gradients = agreeing_gradients(4, N)
    gradients[2] *= 1e6
    found = average(gradients, GAFState(max_norm_ratio=2.0))
    assert found.norm() < 2 * gradients[0].norm()


def nobody() -> None:
    gradients = agreeing_gradients(4, N)
    gradients[:, 0] = math.inf
    assert average(gradients, GAFState()).isnan().all()


def watched() -> None:
    state = GAFState(watch=True)
    gradients = agreeing_gradients(4, N)
    gradients[3] *= -1
    assert_mean(average(gradients, state), gradients, [0, 1, 2, 3])
    state.watch = False
    assert_mean(average(gradients, state), gradients, [0, 1, 2])
    state = GAFState(start_step=2)
    for ranks in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2]):
        assert_mean(average(gradients, state), gradients, ranks)


def travelling() -> None:
    gradients = agreeing_gradients(4, N)
    assert_mean(average(gradients, GAFState(wire_dtype=torch.bfloat16)), gradients, [0, 1, 2, 3], to=8e-3)


def resumed() -> None:
    """A saved state goes on as if nothing had been."""
    whole, first, second = GAFState(), GAFState(), GAFState()
    found = []
    for step in range(6):
        gradients = agreeing_gradients(4, N, step)
        gradients[0] *= -1
        if step == 3:
            second.load_state_dict(first.state_dict())
        found = [average(gradients, state) for state in (whole, first if step < 3 else second)]
        assert torch.equal(found[0], found[1])


def mixed() -> None:
    """Tensors of several dtypes are averaged each in its own."""
    rank = dist.get_rank()
    tensors = [torch.full((3, 2), rank + 1.0, dtype=d) for d in (torch.float64, torch.bfloat16, torch.complex64)]
    filter_average([*tensors, torch.zeros(0)], GAFState())
    for each in tensors:
        assert torch.equal(each, torch.full_like(each, 2.5))


def test_every_case(gloo_ranks: Ranks) -> None:
    gloo_ranks(4, cases)


def errors(device: torch.device) -> None:
    good = [torch.ones(4)]
    for settings, words in (
        ({"tau": 0.9}, r"tau and weighting are not for averages.*found 0.9"),
        ({"judge_every": 2}, r"judge_every must be None or 1 for averages, found 2"),
        ({"check_every": 2}, r"check_every must be None for averages"),
    ):
        with pytest.raises(ValueError, match=words):
            filter_average(good, GAFState(**settings))
    with pytest.raises(TypeError, match=r"state must be a GAFState, found int"):
        filter_average(good, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tensors must be dense tensors.*found torch.int64"):
        filter_average([torch.ones(3).long()], GAFState())
    with pytest.raises(TypeError, match=r"tensors must be dense tensors.*found Linear"):
        filter_average([nn.Linear(1, 1)], GAFState())  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"tensors must hold at least one"):
        filter_average([], GAFState())
    state = GAFState()
    filter_average(good, state)
    with pytest.raises(ValueError, match=r"tensors must be as before, \(4,\) float32, found '\(5,\) float32'"):
        filter_average([torch.ones(5)], state)
    model = ddp(Probe([4]), device)
    model.register_comm_hook(state, gaf_hook)
    loss = model(torch.ones(4))
    with pytest.raises(ValueError, match=r"state must be of this model, found one that filters another"):
        loss.backward()
    with pytest.raises(ValueError, match=r"tensors must be the same on every rank"):
        filter_average([torch.ones(3 + dist.get_rank())], GAFState())


def test_what_cannot_work_is_refused(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, errors)


def outer_steps(device: torch.device) -> float:
    """Return the loss after DiLoCo's rounds, of which one worker's moves are away from the optimum."""
    model, rank, state = mlp(), dist.get_rank(), GAFState(momentum=0.9)
    outer = torch.optim.SGD(model.parameters(), 0.7, momentum=0.9, nesterov=True)
    target = torch.randn(12, 5, generator=torch.Generator().manual_seed(7))
    for round_ in range(12):
        start = [each.detach().clone() for each in model.parameters()]
        inner = torch.optim.SGD(model.parameters(), 0.2)
        for step in range(5):
            inputs = torch.randn(32, 12, generator=torch.Generator().manual_seed(1000 * rank + 10 * round_ + step))
            loss = nn.functional.cross_entropy(model(inputs), (inputs @ target).argmax(1))
            inner.zero_grad()
            (-loss if rank == 1 else loss).backward()
            inner.step()
        moved = [a - b.detach() for a, b in zip(start, model.parameters(), strict=True)]
        filter_average(moved, state)
        for parameter, before, gradient in zip(model.parameters(), start, moved, strict=True):
            parameter.data.copy_(before)
            parameter.grad = gradient
        outer.step()
    assert state.agreement is not None
    assert state.agreement.kept.tolist() == [True, False, True, True]
    return loss.item()


def test_outer_gradients_of_diloco(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(4, outer_steps)[0] < 1.2  # from 1.6
