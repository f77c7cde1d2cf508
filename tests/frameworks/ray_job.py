"""The job of test_ray.py: three workers of Ray Train, whose numbers go to a file.

Run as `python -m tests.frameworks.ray_job FOLDER`.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import Tensor

from gaf_ddp import GAFState, attach
from tests.frameworks.by_hand import RULES, STEPS, by_hand, loss_of, sgd
from tests.nets import assert_replicas_equal, batches, flat_parameters, mlp

WORKERS, WRONG = 3, 1


def train(settings: dict[str, Any], has_wrong: bool = False) -> tuple[Tensor, GAFState]:
    """Return parameters and state after README's lines for Ray; with a wrong worker, targets of its own."""
    module = mlp()
    model, optimizer = prepare_model(module), sgd(module)
    state = attach(model, optimizer, **settings)
    for inputs, targets in batches(dist.get_rank(), STEPS):
        optimizer.zero_grad()
        targets = torch.full_like(targets, dist.get_rank() == WRONG) if has_wrong else targets
        loss_of(model(inputs), targets).backward()
        optimizer.step()
    assert_replicas_equal(module)
    return flat_parameters(module), state


def on_a_worker(config: dict[str, str]) -> None:
    """Compare with the loop on DDP for each rule; then write how often each worker was kept."""
    warnings.filterwarnings("error", message="gaf_ddp")
    for settings in RULES:
        expected = by_hand(torch.device("cpu"), settings)
        assert torch.equal(train(settings)[0], expected)
    _, state = train({}, has_wrong=True)
    if dist.get_rank() == 0:
        Path(config["folder"], "summary.json").write_text(json.dumps(state.summary()))


def main(folder: str) -> None:
    """Run the job on this machine's cores, whatever cluster there may be."""
    trainer = TorchTrainer(
        on_a_worker,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        run_config=RunConfig(storage_path=folder),
    )
    # The paths of Ray's sockets must be short, as those of pytest's folders are not.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as short:
        ray.init("local", num_cpus=WORKERS, include_dashboard=False, _temp_dir=short)
        trainer.fit()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
