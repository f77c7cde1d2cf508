"""Fixtures that start ranks; see tools/ranks.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.ranks import run_ranks

torch.set_num_threads(1)  # the tests' tensors are small, and the ranks want the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start ranks, which the quick loop leaves out."""
    for item in items:
        if {"ranks", "gloo_ranks", "nccl_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)


def _ranks(backend: str, folder: Path) -> Callable[..., list[Any]]:
    def run(world_size: int, *args: Any, **options: Any) -> list[Any]:
        if backend == "nccl" and torch.cuda.device_count() < world_size:
            pytest.skip(f"NCCL needs a GPU per rank: {world_size}")
        return run_ranks(world_size, *args, folder=folder, backend=backend, **options)

    return run


@pytest.fixture(params=["gloo", "nccl"])
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks(W, body, *args)` returns what `body(device, *args)` returned on each rank, on gloo and on NCCL."""
    return _ranks(request.param, tmp_path)


@pytest.fixture
def gloo_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks` for what only CPU groups have."""
    return _ranks("gloo", tmp_path)


@pytest.fixture
def nccl_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks` for what only GPUs have."""
    return _ranks("nccl", tmp_path)
