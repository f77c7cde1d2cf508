"""Collectives of our own: Gramians as triangles, text of any length, and no deprecated name."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.runtime.collectives import all_gather_text, all_reduce_gramian, reduced_numbers
from tests.gradients import random_gradients
from tests.nets import world
from tests.properties import gramian_of

Ranks = Callable[..., list[Any]]


def gramian_of_rank(size: int, below: int, rank: int) -> Tensor:
    """Return a Gramian of so many gradients, of which one is not finite, and further rows below it."""
    gradients = random_gradients(size, 20, seed=rank)
    if rank == 1:
        gradients[size // 2] = torch.nan
    return torch.cat([gramian_of(gradients), gradients[:, :below].T.double()])


SHAPES = [(size, below) for size in (1, 2, 64, 65, 100) for below in (0, 1, 2)]


def reduce(device: torch.device) -> list[Tensor]:
    gramians = [gramian_of_rank(size, below, dist.get_rank()).to(device) for size, below in SHAPES]
    return [all_reduce_gramian(gramian, world()).cpu() for gramian in gramians]


def test_gramians_are_added_up(ranks: Ranks) -> None:
    outcomes = ranks(3, reduce)
    for (size, below), *found in zip(SHAPES, *outcomes, strict=True):
        expected = torch.stack([gramian_of_rank(size, below, rank) for rank in range(3)]).sum(0)
        for each in found:
            torch.testing.assert_close(each, expected, equal_nan=True)
            assert torch.equal(each.nan_to_num(9), found[0].nan_to_num(9))


def test_beyond_64_ranks_half_of_the_gramian_travels() -> None:
    assert [reduced_numbers(size) for size in (1, 2, 64, 65, 1024)] == [1, 4, 4096, 2145, 524_800]


TEXTS = ["", "a", "tau 0.9, Δ ≤ 1, 角\n" * 500]


ORDERS = [[0, 1, 2], [2, 0, 1], [1, 1, 1]]


def gather_texts(device: torch.device) -> list[list[str]]:
    return [all_gather_text(TEXTS[order[dist.get_rank()]], world(), device) for order in ORDERS]


def test_text_of_any_length_arrives_in_rank_order(ranks: Ranks) -> None:
    assert ranks(3, gather_texts) == [[[TEXTS[i] for i in order] for order in ORDERS]] * 3


@pytest.mark.job
def test_no_collective_is_deprecated() -> None:
    code = """
import warnings; warnings.simplefilter("error")
import torch, torch.distributed as dist
from gaf_ddp.runtime.collectives import all_gather_single, reduce_scatter_single
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
out = torch.empty(4)
all_gather_single(out, torch.ones(4))
reduce_scatter_single(out, torch.ones(4))
assert out.tolist() == [1.0] * 4
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
