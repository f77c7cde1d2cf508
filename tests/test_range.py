"""Gradients of any length that their dtype can hold are judged right: squares must not leave float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, Mean, NeighborhoodAgreement, SequentialAgreement, Weighting, gaf_hook, gram
from gaf_ddp.rules.agreement import decide
from tests import oracle
from tests.accelerator import take_accelerators_way
from tests.gradients import agreeing_gradients, random_gradients
from tests.marks import job_but
from tests.nets import Probe, ddp, flat_gradients

Ranks = Callable[..., list[Any]]

SIZES = [300, 100]
WIDE = [1e-30, 1e-20, 1.0, 1e20, 1e30]
NORMS = {torch.float32: WIDE, torch.bfloat16: WIDE, torch.float16: [1e-3, 1.0, 1e5]}
RULES: list[tuple[Weighting, oracle.Rule]] = [
    (Mean(), oracle.mean),
    (NeighborhoodAgreement(0.8), oracle.neighborhood(0.8)),
    (SequentialAgreement(0.8), oracle.sequential(0.8)),
]

every_dtype = pytest.mark.parametrize("dtype", NORMS, ids=str)


def units(gradients: Tensor) -> Tensor:
    return torch.nn.functional.normalize(gradients.double(), dim=1, eps=0)


def of_norms(gradients: Tensor, norms: list[float], dtype: torch.dtype) -> Tensor:
    """Return the gradients `(W, n)` at norms that repeat, as the dtype can hold them."""
    wanted = torch.tensor([norms[i % len(norms)] for i in range(len(gradients))], dtype=torch.float64)
    return (units(gradients) * wanted[:, None]).to(dtype)


def cosines(gradients: Tensor) -> Tensor:
    unit = units(gradients)
    return unit @ unit.T


def assert_decided(rows: Tensor, ratio: float | None) -> None:
    for weighting, rule in RULES:
        found = decide(gram(rows), weighting, ratio)
        expected = oracle.filtered(list(rows), rule, ratio)
        assert found.voters.all()
        assert found.kept.nonzero().flatten().tolist() == expected.kept
        oracle.assert_close(found.weights @ rows.double(), expected.gradient, 1e-10)
        torch.testing.assert_close(found.cosine, cosines(rows), rtol=0, atol=1e-5)


@every_dtype
@pytest.mark.parametrize("world_size", [2, 5, 9, 17])
def test_ranks_of_one_norm(world_size: int, dtype: torch.dtype) -> None:
    for norm in NORMS[dtype]:
        for seed in range(3):
            assert_decided(of_norms(random_gradients(world_size, 400, seed), [norm], dtype), 10.0)


@every_dtype
@pytest.mark.parametrize("world_size", [2, 5, 9, 17])
def test_ranks_of_unlike_norms(world_size: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        assert_decided(of_norms(random_gradients(world_size, 400, seed), NORMS[dtype], dtype), None)


@every_dtype
def test_zero_beside_the_smallest_is_no_voter_and_beyond_the_largest_is_not_finite(dtype: torch.dtype) -> None:
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    for world_size in (3, 9):
        rows = torch.zeros(world_size, 7, dtype=dtype)
        rows[0, 3], rows[1, 3] = least, most
        found = decide(gram(rows), Mean(), None)
        assert found.voters.tolist() == [True, True] + [False] * (world_size - 2)
        assert not found.nonfinite.any()
        rows[1, 3] = torch.inf
        assert decide(gram(rows), Mean(), None).nonfinite.nonzero().flatten().tolist() == [1]


SETTINGS: list[dict[str, Any]] = [
    {"scope": scope, "exchange": exchange}
    for scope in ("bucket", "model")
    for exchange in ("sharded", "gather", "sketch")
]


class Filtered(NamedTuple):
    """What the hook made of gradients, and its record."""

    gradient: Tensor
    kept: Tensor
    cosine: Tensor


def filter_all(
    device: torch.device, gradients: dict[torch.dtype, list[Tensor]], as_accelerator: bool
) -> list[Filtered]:
    """Filter all gradients `(W, N)` of each dtype by each of SETTINGS."""
    if as_accelerator:
        take_accelerators_way()
    found = []
    for settings in SETTINGS:
        for dtype, of_dtype in gradients.items():
            probe, state = Probe(SIZES, [dtype] * 2), GAFState(tau=0.9, max_norm_ratio=None, **settings)
            model = ddp(probe, device)
            model.register_comm_hook(state, gaf_hook)
            for rows in of_dtype:
                probe.zero_grad()
                model(rows[dist.get_rank()].to(device)).backward()
                assert state.agreement is not None
                kept, cosine = state.agreement.kept.view(-1), state.agreement.cosine.view(len(rows), -1)
                found.append(Filtered(flat_gradients(probe).cpu(), kept.cpu(), cosine.cpu()))
    return found


@pytest.mark.parametrize("as_accelerator", job_but(False, of=[False, True]))
def test_the_hook_filters_gradients_of_any_norm(gloo_ranks: Ranks, as_accelerator: bool) -> None:
    agreeing = agreeing_gradients(3, sum(SIZES))
    agreeing[1] *= -1
    gradients = {
        dtype: [of_norms(agreeing, some, dtype) for some in (*([norm] for norm in norms), [norms[0], norms[-1]])]
        for dtype, norms in NORMS.items()
    }
    cases = [(settings, rows) for settings in SETTINGS for of_dtype in gradients.values() for rows in of_dtype]
    for outcomes in gloo_ranks(3, filter_all, gradients, as_accelerator):
        for (settings, rows), found in zip(cases, outcomes, strict=True):
            expected = oracle.filtered(list(rows), oracle.neighborhood(0.9), None)
            assert found.kept.nonzero().flatten().tolist() == expected.kept == [0, 2]
            oracle.assert_close(found.gradient, expected.gradient, 1e-6 if rows.dtype == torch.float32 else 8e-3)
            tolerance = 0.1 if settings["exchange"] == "sketch" else 1e-5
            torch.testing.assert_close(found.cosine, cosines(rows), rtol=0, atol=tolerance)
