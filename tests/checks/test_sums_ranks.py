"""Averages in training, compared with what ranks voted with: faults are told on every rank, sound sums never are."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.checks import ballots
from gaf_ddp.checks.sums import GUARDED, require_sums
from tests.checks.faults import FAULTS, error_of, faulty_sums
from tests.marks import job_but
from tests.nets import Probe, batches, ddp, mlp

Ranks = Callable[..., list[Any]]
BUCKETS = {"bucket_cap_mb": 0.002}


def fail(device: torch.device, fault: str, dtype: torch.dtype, settings: dict[str, Any]) -> tuple[str, int]:
    """Train with a fault from step 10 on; return what is said, and how many steps after it."""
    spoil, argument = FAULTS[fault]
    model = ddp(mlp(dtype=dtype), device, **BUCKETS)
    state = GAFState(check_every=1, **settings)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # replicas stay the same: it is the sums that are told
    data = batches(dist.get_rank(), 20)

    def step(number: int) -> None:
        inputs, labels = data[number]
        optimizer.zero_grad()
        cross_entropy(model(inputs.to(device, dtype)).float(), labels.to(device)).backward()
        optimizer.step()

    for number in range(10):
        step(number)
    with faulty_sums(lambda tensor, add_up: spoil(tensor, add_up, argument)):
        said = error_of(lambda: list(map(step, range(10, 20))))
    return said, state.step - 10


@pytest.mark.parametrize("dtype", job_but(torch.float32, of=[torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("world_size", job_but(3, of=[2, 3, 4]))
def test_a_fault_names_its_rank_on_every_rank(
    gloo_ranks: Ranks, world_size: int, fault: str, dtype: torch.dtype
) -> None:
    for said, steps in gloo_ranks(world_size, fail, fault, dtype, {}):
        assert steps == 2, said
        assert "the average must be that of the gradients that ranks voted with" in said
        if fault == "noise":
            assert "found another on ranks 1 (" in said
            assert "as if" not in said
        else:
            assert ", as if rank 1 (" in said


def test_ballots_of_several_steps_tell_in_the_next_but_one(gloo_ranks: Ranks) -> None:
    for said, steps in gloo_ranks(3, fail, "turned", torch.float32, {"judge_every": 2}):
        assert ", as if rank 1 (" in said
        assert steps == 4


Clean = tuple[torch.dtype, dict[str, Any], bool]


def train(device: torch.device, runs: list[Clean], steps: int) -> list[tuple[float, int, float]]:
    """Train well; return of each run how far sums were off, how many were checked, how often the last was kept."""
    return [_train(device, *run, steps) for run in runs]


def _train(
    device: torch.device, dtype: torch.dtype, settings: dict[str, Any], has_bad_rank: bool, steps: int
) -> tuple[float, int, float]:
    seen: list[float] = []

    def require(off: list[float], hosts: Any, suspects: Any) -> None:
        seen.extend([] if GUARDED in off else off)
        require_sums(off, hosts, suspects)

    vars(ballots)["require_sums"] = require
    rank, world = dist.get_rank(), dist.get_world_size()
    model = ddp(mlp(dtype=dtype), device, **BUCKETS)
    state = GAFState(**{"check_every": 1, **settings})
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for inputs, labels in batches(rank, steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs.to(device, dtype)).float(), labels.to(device))
        (50 * loss if has_bad_rank and rank == world - 1 else loss).backward()
        optimizer.step()
    checked = [off for off in seen if off > 0]
    return max(checked), len(checked) // world, state.summary()[f"gaf/kept_rank_{world - 1:02d}"]


def assert_clean(outcomes: list[list[tuple[float, int, float]]], runs: list[Clean], steps: int) -> None:
    for outcome in outcomes:
        for (farthest, checked, kept), (_, settings, has_bad_rank) in zip(outcome, runs, strict=True):
            assert farthest < 0.25, "a tolerance must have some margin"
            assert checked >= 0.9 * steps / settings.get("judge_every", 1) / settings.get("check_every", 1) - 3
            assert kept < 0.2 or not has_bad_rank or len(outcomes) == 2


@pytest.mark.parametrize("world_size", job_but(3, of=[2, 3, 4]))
def test_sound_sums_raise_nothing(gloo_ranks: Ranks, world_size: int) -> None:
    many = world_size != 3
    dtypes = [torch.float32, torch.bfloat16]
    runs: list[Clean] = [(d, s, b) for d in dtypes for s in ({}, {"judge_every": 4}) for b in (False, True)]
    steps = 120 if many else 60
    runs = runs if many else [runs[1], runs[3], runs[5]]
    assert_clean(gloo_ranks(world_size, train, runs, steps, timeout=170.0), runs, steps)


@pytest.mark.job
def test_sound_sums_of_all_dtypes_on_the_wire_raise_nothing(gloo_ranks: Ranks) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    runs: list[Clean] = [(d, {"wire_dtype": wire}, True) for d in dtypes for wire in dtypes]
    assert_clean(gloo_ranks(3, train, runs, 100, timeout=170.0), runs, 100)


UNEVEN = [{"check_every": 3, "judge_every": 4}, {"check_every": 5, "judge_every": 2}, {"check_every": 7}]


def test_ballots_are_checked_whole_however_steps_fall_into_them(gloo_ranks: Ranks) -> None:
    runs: list[Clean] = [(torch.float32, settings, True) for settings in UNEVEN]
    assert_clean(gloo_ranks(3, train, runs, 60), [(d, {"check_every": 60}, b) for d, _, b in runs], 60)


def spoil_gradients(device: torch.device, settings: dict[str, Any], kind: str) -> str:
    """Return what is said where ranks' gradients are odd, and the sums are right."""
    model = ddp(Probe([50, 60]), device, bucket_cap_mb=0.0001)
    state = GAFState(check_every=1, **settings)
    model.register_comm_hook(state, gaf_hook)
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(dist.get_rank())

    def steps() -> None:
        for step in range(24):
            gradient = torch.randn(110, generator=generator) + 1
            if kind == "zero everywhere" and step % 3 == 0:
                gradient.zero_()
            elif kind == "a bucket zero everywhere":
                gradient[:50] = 0
            elif step % 5 == 3 and rank == step % 2:
                gradient *= {"zero": 0.0, "long": 12.0, "very long": 1e4, "nan": math.nan}.get(kind, 1.0)
            if kind == "tiny":
                gradient *= 1e-37
            if kind == "start":  # of a ballot of four the second half lets in who was out
                gradient *= -1 if rank == 2 else 1
                state.start_step = 9 if step == 6 else state.start_step
            model(gradient.to(device)).backward()

    return error_of(steps)


KINDS = ["zero everywhere", "a bucket zero everywhere", "zero", "long", "very long", "nan", "tiny", "start"]
ODD: list[dict[str, Any]] = [{}, {"judge_every": 4}, {"tau": 0.9, "watch": True}, {"watch": True, "judge_every": 3}]


def spoil_all(device: torch.device) -> dict[str, str]:
    return {f"{kind} {settings}": spoil_gradients(device, settings, kind) for kind in KINDS for settings in ODD}


def test_odd_gradients_raise_nothing(gloo_ranks: Ranks) -> None:
    for found in gloo_ranks(3, spoil_all):
        assert {kind: said for kind, said in found.items() if said != "nothing"} == {}
