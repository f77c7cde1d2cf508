"""What ranks tell each other arrives as it was, and none of it is unpickled."""

import math
import pickle
from typing import Any

import torch
import torch.distributed as dist

from launch.messages import from_first, gathered
from tests.launch.jobs import RunRanks, assert_same


def _state() -> dict[str, Any]:
    """Return what a trainer's state is made of: nested, with keys and tensors of several kinds."""
    model: dict[str, Any] = {
        "weight": torch.arange(6.0).view(2, 3).T,
        "count": torch.tensor(7),
        "on": torch.tensor([True, False]),
    }
    optimizer = {"state": {0: {"momentum": torch.ones(3, dtype=torch.bfloat16)}, 1: {}}, "rates": [0.1, None]}
    model |= {"none": torch.empty(0), "memory": [b"", b"\0\xff"]}
    return {"model": model, "optimizer": optimizer, "loss": [math.inf, 1], "é\0": "\0"}


def _rank(device: torch.device) -> None:
    pickle.loads = pickle.load = pickle.Unpickler = None  # type: ignore[assignment,misc]
    assert gathered({"rank": dist.get_rank()}) == [{"rank": 0}, {"rank": 1}]
    assert_same(from_first(_state() if dist.get_rank() == 0 else None), _state())


def test_everything_arrives_without_pickle(gloo_ranks: RunRanks) -> None:
    gloo_ranks(2, _rank)
