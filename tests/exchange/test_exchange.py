"""The exact exchanges on real groups, against the oracle, with the same bits on every rank."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import NeighborhoodAgreement, SequentialAgreement, Weighting, gram
from gaf_ddp.exchange.gather import GatherExchange
from gaf_ddp.exchange.sharded import ShardedExchange
from gaf_ddp.rules.agreement import decide
from tests import oracle
from tests.gradients import random_gradients
from tests.marks import job_but
from tests.nets import world

Ranks = Callable[..., list[Any]]

Kind = type[GatherExchange] | type[ShardedExchange]

KINDS: list[Kind] = [GatherExchange, ShardedExchange]
LENGTHS = [1, 6, 7, 1000, 9999]  # also shorter than the world, and not divisible by it


class Case(NamedTuple):
    gradients: Tensor  # (W, N)
    weighting: Weighting
    wire: torch.dtype | None = None


def exchanged(device: torch.device, kind: Kind, case: Case) -> tuple[Tensor, Tensor]:
    """Send this rank's row through the exchange; return the filtered bucket and the Gramian."""
    exchange = kind(world(), case.wire)
    bucket = case.gradients[dist.get_rank()].clone().to(device)
    rows = exchange.scatter(bucket)
    assert len(rows) == dist.get_world_size()
    message = torch.zeros(1, len(rows), dtype=torch.float64, device=device)
    message[:, dist.get_rank()] = 2.0**48 - dist.get_rank()
    summed = exchange.sum(torch.cat([gram(rows), message]))
    gramian, messages = summed[:-1], summed[-1]
    assert messages.tolist() == [2.0**48 - rank for rank in range(len(rows))]
    exchange.gather(rows, decide(gramian, case.weighting, None).weights, bucket)
    return bucket.cpu(), gramian.cpu()


def exchange_all(device: torch.device, cases: list[Case]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    return {kind.__name__: [exchanged(device, kind, case) for case in cases] for kind in KINDS}


def assert_same_bits(outcomes: list[dict[str, list[tuple[Tensor, Tensor]]]]) -> None:
    """Assert that every rank got what rank 0 got."""
    for name, first in outcomes[0].items():
        for outcome in outcomes[1:]:
            for here, there in zip(outcome[name], first, strict=True):
                assert torch.equal(here[0].view(torch.uint8), there[0].view(torch.uint8)), name
                assert torch.equal(here[1].view(torch.uint8), there[1].view(torch.uint8)), name


@pytest.mark.parametrize("world_size", job_but(1, 3, of=[1, 2, 3, 4, 7]))
def test_exchanges_equal_the_oracle(ranks: Ranks, world_size: int) -> None:
    cases, expected = [], []
    for length in LENGTHS:
        for spoilt in (None, 0.0, torch.nan):
            rows = random_gradients(world_size, length, seed=length + 2)
            if spoilt is not None:
                rows[world_size // 2] = spoilt
            for weighting, rule in [
                (NeighborhoodAgreement(0.97), oracle.neighborhood(0.97)),
                (SequentialAgreement(0.97, running="half"), oracle.sequential(0.97, "half")),
            ]:
                cases.append(Case(rows, weighting))
                expected.append(oracle.filtered(list(rows), rule, None).gradient)
    outcomes = ranks(world_size, exchange_all, cases)
    assert_same_bits(outcomes)
    for found in outcomes[0].values():
        for case, gradient, (bucket, gramian) in zip(cases, expected, found, strict=True):
            # Seen: up to 8e-8 of the bucket's norm, and 2.6e-7 of the product of two ranks' norms.
            oracle.assert_close(bucket, gradient, 1e-6)
            exact = case.gradients.double() @ case.gradients.double().T
            norms = exact.diagonal().sqrt()
            error = (gramian - exact).abs()
            assert (error <= 1e-5 * norms[:, None] * norms[None, :])[~exact.isnan()].all()
            assert torch.equal(gramian.isnan(), exact.isnan())


# In units of the result's norm: what rounding to the dtype makes of the gradients sent and of the result.
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("world_size", job_but(3, of=[1, 2, 3]))
def test_exchanges_take_every_dtype_and_wire(ranks: Ranks, world_size: int) -> None:
    cases = [
        Case(random_gradients(world_size, length, seed=3).to(dtype), NeighborhoodAgreement(2.0), wire)
        for length in (7, 20_000)
        for dtype in ROUNDING
        for wire in (None, torch.float16, torch.bfloat16, torch.float32)
    ]
    outcomes = ranks(world_size, exchange_all, cases)
    assert_same_bits(outcomes)
    for found in outcomes[0].values():
        for (gradients, _, wire), (bucket, _) in zip(cases, found, strict=True):
            assert bucket.dtype == gradients.dtype
            tolerance = max(ROUNDING[gradients.dtype], ROUNDING[wire or gradients.dtype])
            oracle.assert_close(bucket, gradients.double().mean(0), tolerance)


def test_half_precision_is_summed_in_float32(ranks: Ranks) -> None:
    # One by one in bfloat16, 256 + 1 + 1 + 1 is 256, and the mean 64.
    gradients = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16).expand(4, 8).contiguous()
    for outcome in ranks(4, exchange_all, [Case(gradients, NeighborhoodAgreement(2.0))]):
        for [(bucket, _)] in outcome.values():
            assert bucket.tolist() == [65.0] * 8  # 64.75, rounded once
