"""A rank that raises, or dies, in the midst of training one step late: the others end by the time-out, never hang."""

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from gaf_ddp import GAFState, gaf_hook
from tests.nets import batches, ddp, mlp
from tools.ranks import RankError

Ranks = Callable[..., list[Any]]

TIMEOUT = 4.0  # seconds


def train(device: torch.device, how: str, folder: Path, settings: dict[str, Any]) -> tuple[str, float]:
    """Train until rank 1 fails in step 3; return what backward, or the user's loss, raised, and after which time."""
    store = dist.FileStore(str(folder / "ended"), 3)  # type: ignore[attr-defined]
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    assert isinstance(group, dist.ProcessGroup)
    model, state = ddp(mlp(), device, process_group=group, bucket_cap_mb=0.001), GAFState(group, **settings)
    model.register_comm_hook(state, gaf_hook)
    end, begun = "nothing", 0.0
    try:
        for step, (inputs, targets) in enumerate(batches(dist.get_rank(), 5)):
            begun = time.monotonic()
            loss = cross_entropy(model(inputs), targets)
            if step == 3 and dist.get_rank() == 1:
                if how == "dies":
                    os._exit(3)
                raise LookupError("no label today")
            loss.backward()
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    passed = time.monotonic() - begun
    if how == "dies":
        raise AssertionError(f"{passed:.1f} s, {end}")
    store.set(str(dist.get_rank()), "ended")  # a closed connection would end the others before the time-out does
    store.wait([str(rank) for rank in range(3)], timedelta(seconds=6 * TIMEOUT))
    return end, passed


@pytest.mark.parametrize("settings", [{}, {"judge_every": 2}, {"watch": True}], ids=str)
def test_a_loss_that_raises_ends_the_others_by_the_time_out(
    gloo_ranks: Ranks, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for rank, (end, seconds) in enumerate(gloo_ranks(3, train, "raises", tmp_path, settings)):
        if rank == 1:
            assert end == "LookupError: no label today"
        else:
            assert seconds < 2 * TIMEOUT + 2
            assert re.search(r"gaf_ddp: step 3, bucket 0 \(has a rank ended\? .*: ", end), end


def hook_rank_0_alone(device: torch.device) -> str:
    """Return what backward raises where only rank 0 has the hook."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    assert isinstance(group, dist.ProcessGroup)
    model = ddp(mlp(), device, process_group=group)
    if dist.get_rank() == 0:
        model.register_comm_hook(GAFState(group), gaf_hook)
    try:
        for _ in range(2):
            model(torch.ones(2, 12)).sum().backward()
            time.sleep(2 * TIMEOUT)  # a process that ends would end the others sooner
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_hook_on_one_rank_alone_asks_whether_it_is_on_every_rank(gloo_ranks: Ranks) -> None:
    assert "before the first bucket (is the hook on every rank?)" in gloo_ranks(3, hook_rank_0_alone)[0]


def test_a_rank_that_dies_ends_the_others_at_once(gloo_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        gloo_ranks(3, train, "dies", tmp_path, {})
    failures = caught.value.failures
    assert failures.pop(1) == "died with exit code 3"
    for text in failures.values():
        assert re.search(r"AssertionError: [0-3]\.. s, RuntimeError: ", text), text
