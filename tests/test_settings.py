"""Ranks that would decide unlike are told so: at the first bucket, or at the step from which on they differ."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, Mean, NeighborhoodAgreement, Weighting, gaf_hook, skip_on_disagreement
from gaf_ddp import alike as of_the_package
from tests.marks import job_but
from tests.nets import Probe, ddp

Ranks = Callable[..., list[Any]]

W = 3


class Odd(Weighting):
    """A user's rule, whose `repr` holds an address, another one on every rank."""

    def __call__(self, gramian: Tensor) -> Tensor:
        return torch.full_like(gramian[0], 1 / len(gramian))

    __repr__ = object.__repr__


def constant(step: int) -> float:
    return 1.0


def half(step: int) -> float:
    return 0.5


def backwards(device: torch.device, usual: dict[str, Any], unusual: dict[str, Any], step: int) -> list[str]:
    """Return how two models' first backwards end where rank 1's settings, or its step, differ."""
    mine = dist.get_rank() == 1
    settings = unusual if mine else usual
    ends = []
    for _ in range(2):
        state = GAFState(
            **(settings if "weighting" in settings or "momentum" in settings else {"tau": 1.0, **settings})
        )
        state.step = step if mine else 0
        model = ddp(Probe([40]), device)
        model.register_comm_hook(state, gaf_hook)
        try:
            model(torch.ones(40, device=device)).backward()
            ends.append("nothing")
        except ValueError as error:
            ends.append(str(error))
    return ends


Case = tuple[dict[str, Any], dict[str, Any], int]  # usual settings, rank 1's, rank 1's step

UNLIKE: list[tuple[Case, str, str]] = [  # with what is named, and how it differs
    (({}, {"tau": 0.5}, 0), "tau", "1.0 on rank 0 and 0.5"),
    (({}, {"tau": half}, 0), "tau", "1.0 on rank 0 and 0.5"),
    (({}, {"tau": None}, 0), "tau", "1.0 on rank 0 and None"),
    (({}, {"weighting": Mean()}, 0), "tau", "1.0 on rank 0 and None"),
    (({}, {"scope": "model"}, 0), "scope", "bucket on rank 0 and model"),
    (({}, {"exchange": "gather"}, 0), "exchange", "auto on rank 0 and gather"),
    (({}, {"sketch_size": 64}, 0), "sketch_size", "4096 on rank 0 and 64"),
    (({}, {"wire_dtype": torch.float16}, 0), "wire_dtype", "None on rank 0 and torch.float16"),
    (({"momentum": 0.9}, {"momentum": 0.5}, 0), "momentum", "0.9 on rank 0 and 0.5"),
    (({}, {"watch": True}, 0), "watch", "False on rank 0 and True"),
    (({}, {"max_norm_ratio": None}, 0), "max_norm_ratio", "10.0 on rank 0 and None"),
    (({}, {"start_step": 1}, 0), "start_step", "0 on rank 0 and 1"),
    (
        ({"weighting": NeighborhoodAgreement(0.9)}, {"weighting": NeighborhoodAgreement(0.8)}, 0),
        "weighting",
        "NeighborhoodAgreement(tau=0.9) on rank 0 and NeighborhoodAgreement(tau=0.8)",
    ),
    (({}, {}, 7), "step", "0 on rank 0 and 7"),  # as of a checkpoint that only rank 1 loaded
]
ALIKE: list[Case] = [
    ({"max_norm_ratio": 10}, {"max_norm_ratio": 10.0}, 0),
    ({"tau": 1}, {"tau": 1.0}, 0),
    ({"momentum": 0}, {"momentum": 0.0}, 0),
    ({"tau": constant}, {"tau": 1.0}, 0),
    ({"tau": constant}, {"tau": constant}, 0),
    ({"weighting": Odd()}, {"weighting": Odd()}, 0),  # all there is to compare is the name
]


def backwards_of_all(device: torch.device, cases: list[Case]) -> list[list[str]]:
    return [backwards(device, *case) for case in cases]


def test_unlike_settings_are_refused_on_every_rank(ranks: Ranks) -> None:
    for found in ranks(W, backwards_of_all, [case for case, _, _ in UNLIKE], group_timeout=20.0):
        for ends, (_, name, values) in zip(found, UNLIKE, strict=True):
            assert ends == [f"{name} must be the same on every rank, found {values} on rank 1"] * 2


def test_what_decides_alike_or_cannot_be_compared_is_no_difference(ranks: Ranks) -> None:
    assert ranks(W, backwards_of_all, ALIKE) == [[["nothing", "nothing"]] * len(ALIKE)] * W


def backward_with_another_torch(device: torch.device) -> list[str]:
    if dist.get_rank() == 1:
        of_the_package.versions = lambda: {"torch": "1.0", "triton": "none"}  # type: ignore[assignment]
    return backwards(device, {}, {}, 0)


def test_another_torch_is_noticed(ranks: Ranks) -> None:
    found = f"torch must be the same on every rank, found {torch.__version__} on rank 0 and 1.0 on rank 1"
    assert ranks(W, backward_with_another_torch) == [[found] * 2] * W


@dataclass
class Training:
    """What a rank may change between its steps."""

    state: GAFState
    optimizer: torch.optim.Optimizer
    undo: list[Callable[[], None]] = field(default_factory=list)

    def skip(self) -> None:
        self.undo.append(skip_on_disagreement(self.optimizer, self.state))


Change = Callable[[Training, int, int], None]  # (training, rank, step)


def schedules_part_at_step_3(training: Training, rank: int, step: int) -> None:
    training.state.tau = (lambda step: 0.9 if step >= 3 else 1.0) if rank == 1 else constant


def tau_is_assigned_at_step_2(training: Training, rank: int, step: int) -> None:
    if rank == 1 and step == 2:
        training.state.tau = 0.5


def guard_is_assigned_at_step_2(training: Training, rank: int, step: int) -> None:
    if rank == 2 and step == 2:
        training.state.max_norm_ratio = None


def skip_is_missing(training: Training, rank: int, step: int) -> None:
    if rank != 1 and step == 0:
        training.skip()


def skip_comes_late_at_step_1(training: Training, rank: int, step: int) -> None:
    if step == (1 if rank == 1 else 0):
        training.skip()


def skip_is_undone_at_step_2(training: Training, rank: int, step: int) -> None:
    if step == 0:
        training.skip()
    if step == 2 and rank == 1:
        training.undo.pop()()


def all_is_assigned_alike(training: Training, rank: int, step: int) -> None:
    training.state.max_norm_ratio = [10.0, 7.0, None][step % 3]
    training.state.tau = constant if step % 2 else 0.5
    if step == 1:
        training.skip()
    if step == 3:
        training.undo.pop()()


CHANGES: dict[Change, tuple[int, str]] = {
    schedules_part_at_step_3: (3, "tau must be the same on every rank, found 1.0 on rank 0 and 0.9 on rank 1"),
    tau_is_assigned_at_step_2: (2, "tau must be the same on every rank, found 1.0 on rank 0 and 0.5 on rank 1"),
    guard_is_assigned_at_step_2: (
        2,
        "max_norm_ratio must be the same on .* found 10.0 on rank 0 and None on rank 2",
    ),
    skip_is_missing: (0, "skip_on_disagreement must be the same on every rank, found 1 on rank 0 and 0 on rank 1"),
    skip_comes_late_at_step_1: (
        0,
        "skip_on_disagreement must be the same on .* found 1 on rank 0 and 0 on rank 1",
    ),
    skip_is_undone_at_step_2: (2, "skip_on_disagreement must be the same on .* found 1 on rank 0 and 0 on rank 1"),
    all_is_assigned_alike: (5, "nothing"),
}


def train(device: torch.device, change: Change, settings: dict[str, Any]) -> tuple[int, str]:
    """Return after how many steps training raised, and what."""
    probe = Probe([40, 40, 40])
    model, state = ddp(probe, device, bucket_cap_mb=0.0001), GAFState(tau=1.0, **settings)
    model.register_comm_hook(state, gaf_hook)
    training = Training(state, torch.optim.SGD(probe.parameters(), lr=0.1))
    for step in range(5):
        change(training, dist.get_rank(), step)
        try:
            model(torch.ones(120, device=device)).backward()
        except ValueError as error:
            return step, str(error)
        training.optimizer.step()
    return 5, "nothing"


def train_all(device: torch.device, settings: dict[str, Any]) -> list[tuple[int, str]]:
    return [train(device, change, settings) for change in CHANGES]


@pytest.mark.parametrize("exchange", job_but("auto", of=["auto", "gather"]))
@pytest.mark.parametrize("scope", job_but("bucket", of=["bucket", "model"]))
def test_ranks_that_part_later_are_told_at_that_step(gloo_ranks: Ranks, scope: str, exchange: str) -> None:
    for found in gloo_ranks(W, train_all, {"scope": scope, "exchange": exchange}, group_timeout=20.0):
        for (step, message), change in zip(found, CHANGES, strict=True):
            assert (change, step) == (change, CHANGES[change][0])
            assert re.match(CHANGES[change][1], message), message


def weigh_unlike(device: torch.device, how: str, scope: Any, exchange: Any) -> tuple[int, str]:
    """Return after how many steps training raised, and what, where a weighting answers otherwise on rank 1."""
    drawn = torch.Generator().manual_seed(dist.get_rank())

    def weighting(gramian: Tensor) -> Tensor:
        if how == "random":
            return torch.rand(W, generator=drawn)
        return torch.full((W,), 0.0 if dist.get_rank() == 1 and state.step >= 1 else 1 / W)

    state = GAFState(weighting=weighting, scope=scope, exchange=exchange)
    model = ddp(Probe([40, 40, 40]), device, bucket_cap_mb=0.0001)
    model.register_comm_hook(state, gaf_hook)
    for step in range(5):
        try:
            model(torch.ones(120, device=device)).backward()
        except ValueError as error:
            return step, str(error)
    return 5, "nothing"


@pytest.mark.parametrize("exchange", job_but("gather", of=["auto", "gather", "sketch"]))
@pytest.mark.parametrize("scope", ["bucket", "model"])
@pytest.mark.parametrize(("how", "first"), [("random", 0), ("zeros", 1)])
def test_weights_that_differ_are_told_a_step_later_at_most(
    gloo_ranks: Ranks, how: str, first: int, scope: str, exchange: str
) -> None:
    for step, message in gloo_ranks(W, weigh_unlike, how, scope, exchange, group_timeout=20.0):
        assert first <= step <= first + 1
        assert message.startswith("weighting must return the same on every rank: seed one that draws random numbers")
