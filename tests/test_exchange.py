"""The three exchanges on real groups, against the oracle, with the same bits on every rank."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import Mean, NeighborhoodAgreement, SequentialAgreement, Weighting, gram, triangle
from gaf_ddp import exchange as exchange_module
from gaf_ddp.exchange import Exchanges, GatherExchange, PeerExchange, ShardedExchange
from gaf_ddp.verdict import Verdict
from tests import oracle
from tests.gradients import random_gradients

Ranks = Callable[..., list[Any]]

KINDS = [GatherExchange, ShardedExchange, PeerExchange]
LENGTHS = [1, 6, 7, 1000, 9999]  # also shorter than the world, and not divisible by it


class Case(NamedTuple):
    gradients: Tensor  # (W, N)
    weighting: Weighting
    wire: torch.dtype | None = None


def exchanged(device: torch.device, kind: type, case: Case) -> tuple[Tensor, Tensor]:
    """Send this rank's row through the exchange; return the filtered bucket and the Gramian."""
    exchange = kind(dist.group.WORLD, case.wire)
    bucket = case.gradients[dist.get_rank()].clone().to(device)
    rows = exchange.scatter(bucket)()
    assert len(rows) == dist.get_world_size()
    gramian = exchange.sum(gram(rows))
    exchange.gather(rows, Verdict(gramian, case.weighting, None), bucket)()
    return bucket.cpu(), gramian.cpu()


def exchange_all(device: torch.device, cases: list[Case]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    # Peer exchange has no accelerator's counterpart.
    kinds = KINDS if device.type == "cpu" else KINDS[:2]
    return {kind.__name__: [exchanged(device, kind, case) for case in cases] for kind in kinds}


def assert_same_bits(outcomes: list[dict[str, list[tuple[Tensor, Tensor]]]]) -> None:
    """Assert that every rank got what rank 0 got."""
    for name, first in outcomes[0].items():
        for outcome in outcomes[1:]:
            for here, there in zip(outcome[name], first, strict=True):
                assert torch.equal(here[0].view(torch.uint8), there[0].view(torch.uint8)), name
                assert torch.equal(here[1].view(torch.uint8), there[1].view(torch.uint8)), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
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
            error = (gramian.double() - exact).abs()
            assert (error <= 1e-5 * norms[:, None] * norms[None, :])[~exact.isnan()].all()
            assert torch.equal(gramian.isnan(), exact.isnan())


# In units of the result's norm: what rounding to the dtype makes of the gradients sent and of the result.
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("world_size", [1, 2, 3])
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


def summed(device: torch.device, kind: type, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return sums of Gramians that travel whole, and as triangles; one is a momenta's, with a row more."""
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = random_gradients(size, 50, seed=rank).to(device, dtype)
    spoilt = rows.clone()
    spoilt[0] = torch.nan
    gramians = [rows @ rows.T, torch.cat([rows @ rows.T, rows[:, :1].T]), spoilt @ spoilt.T]
    found = []
    for most in (64, 1):
        exchange_module.MOST_SWAPPING = triangle.MOST_WHOLE = most
        exchange = kind(dist.group.WORLD)
        found.append([exchange.sum(gramian.clone()).cpu() for gramian in gramians])
    return found[0], found[1]


@pytest.mark.parametrize("kind", [ShardedExchange, PeerExchange])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_a_triangle_says_as_much_as_the_whole(gloo_ranks: Ranks, world_size: int, kind: type) -> None:
    for dtype in (torch.float32, torch.float64):
        for whole, packed in gloo_ranks(world_size, summed, kind, dtype):
            for expected, found in zip(whole, packed, strict=True):
                assert found.dtype == dtype
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


def where_rows_lie(device: torch.device, wire: torch.dtype | None) -> tuple[bool, bool]:
    """Return whether this rank's row lies in its bucket, and whether the others' memory is used again."""
    exchange, bucket = PeerExchange(dist.group.WORLD, wire), torch.ones(3001)
    received = []
    for _ in range(2):
        rows = exchange.scatter(bucket)()
        own, other = rows[dist.get_rank()], rows[dist.get_rank() - 1]
        in_bucket = own.untyped_storage().data_ptr() == bucket.untyped_storage().data_ptr()
        received.append(other.data_ptr())
        exchange.gather(rows, Verdict(torch.eye(3), Mean(), None), bucket)()
    return in_bucket, received[0] == received[1]


def test_a_peers_own_row_is_not_copied_and_memory_is_used_again(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(3, where_rows_lie, None) == [(True, True)] * 3
    assert gloo_ranks(3, where_rows_lie, torch.bfloat16) == [(False, True)] * 3


def choose(device: torch.device) -> dict[str, str]:
    group = dist.group.WORLD
    assert group is not None
    size = group.size()
    exchanges = Exchanges(group, None)

    def name(setting: str, bytes_in_all: int) -> str:
        bucket = torch.zeros(bytes_in_all // size // 4, device=device)
        return type(exchanges.choose(setting, bucket)).__name__

    return {
        "small": name("auto", 4000),
        "large": name("auto", 4_000_000),
        "sharded": name("sharded", 4000),
        "gather": name("gather", 4_000_000),
    }


def test_auto_gathers_small_buckets_on_accelerators_only(ranks: Ranks) -> None:
    for found in ranks(2, choose):
        assert found["gather"] == "GatherExchange"
        assert found["large"] == found["sharded"]
        assert found["small"] == found["sharded" if found["large"] == "PeerExchange" else "gather"]
        assert found["large"] in ("PeerExchange", "ShardedExchange")
