"""Torch does not require numpy, so neither does the hook: training where it cannot be imported."""

import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import sys

sys.modules["numpy"] = None
rank, store = int(sys.argv[1]), sys.argv[2]

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement

dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for settings in ({}, {"check_every": 1}, {"tau": 1.0}, {"tau": 1.0, "scope": "model", "exchange": "gather"}):
    model, state = DistributedDataParallel(nn.Linear(8, 4)), GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_on_disagreement(optimizer, state)
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert state.step == 3
    state.load_state_dict(state.state_dict())
    assert state.summary()["gaf/kept_fraction"] == 1
assert sys.modules["numpy"] is None
dist.destroy_process_group()
"""


@pytest.mark.job
def test_the_hook_needs_no_numpy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in range(2)]
    try:
        assert [rank.wait(150) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
