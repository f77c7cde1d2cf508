"""attach under Ray Train, as README has it: two workers, the model that `prepare_model` returns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ray_train = pytest.importorskip("ray.train.torch", reason="ray[train] is not installed")

SCRIPT = """
import ray, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

from gaf_ddp import attach


def loop():
    torch.manual_seed(0)
    model = prepare_model(torch.nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = attach(model, optimizer, tau=1.0)
    rank = torch.distributed.get_rank()
    for step in range(4):
        before = model.module.weight.clone()
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).sum()
        (loss if rank == 0 or step % 2 else -loss).backward()
        optimizer.step()
        assert torch.equal(model.module.weight, before) == (step % 2 == 0)
    assert state.step == 4
    assert state.summary()["gaf/skipped_fraction"] == 0.5


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
TorchTrainer(
    loop,
    torch_config=TorchConfig(backend="gloo"),
    scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
    run_config=RunConfig(storage_path=STORAGE),
).fit()
print("fitted")
"""


@pytest.mark.job
def test_two_workers(tmp_path: Path) -> None:
    code = SCRIPT.replace("STORAGE", repr(str(tmp_path)))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1", "OMP_NUM_THREADS": "1"}
    job = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **quiet, "PYTHONWARNINGS": "ignore"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert job.stdout.endswith("fitted\n")
