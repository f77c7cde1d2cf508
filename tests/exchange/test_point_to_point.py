"""PeerExchange: what it does not copy, and sums of more ranks than swap theirs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.exchange import point_to_point as peer
from gaf_ddp.exchange.point_to_point import PeerExchange
from tests.nets import world

Ranks = Callable[..., list[Any]]


def where_rows_lie(device: torch.device, wire: torch.dtype | None) -> tuple[bool, bool]:
    """Return whether this rank's row lies in its bucket, and whether the others' memory is used again."""
    exchange, bucket = PeerExchange(world(), wire), torch.ones(3001)
    received = []
    for _ in range(2):
        rows = exchange.scatter(bucket)()
        own, other = rows[dist.get_rank()], rows[dist.get_rank() - 1]
        in_bucket = own.untyped_storage().data_ptr() == bucket.untyped_storage().data_ptr()
        received.append(other.data_ptr())
        exchange.gather(rows, torch.full((3,), 1 / 3), bucket)()
    return in_bucket, received[0] == received[1]


def test_a_peers_own_row_is_not_copied_and_memory_is_used_again(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(3, where_rows_lie, None) == [(True, True)] * 3
    assert gloo_ranks(3, where_rows_lie, torch.bfloat16) == [(False, True)] * 3


def two_buckets_under_way(device: torch.device) -> None:
    """Send the second of two buckets before the first one is judged."""
    exchange, rank = PeerExchange(world()), dist.get_rank()
    buckets = [torch.full((501,), float(rank)), torch.full((77,), 10.0 * rank)]
    receives = [exchange.scatter(bucket) for bucket in buckets]
    weights = torch.tensor([0.0, 0.5, 0.5])
    finishes = [exchange.gather(receive(), weights, b) for receive, b in zip(receives, buckets, strict=True)]
    for finish in finishes:
        finish()
    assert [bucket.tolist() for bucket in buckets] == [[1.5] * 501, [15.0] * 77]


def test_buckets_travel_at_the_same_time(gloo_ranks: Ranks) -> None:
    gloo_ranks(3, two_buckets_under_way)


def sum_both_ways(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sum over the ranks when they swap, and when they are too many for that."""
    exchange = PeerExchange(world())
    measured = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    swapped = exchange.sum(measured.clone())
    peer.MOST_SWAPPING = 2
    return swapped, exchange.sum(measured.clone())


def test_more_ranks_get_the_same_sums(gloo_ranks: Ranks) -> None:
    for swapped, reduced in gloo_ranks(3, sum_both_ways):
        torch.testing.assert_close(reduced, swapped)
