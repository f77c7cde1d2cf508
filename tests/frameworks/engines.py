"""Engines of other libraries, for tests of filter_parameters, with the steps that each has."""

import os
import warnings
from functools import partial
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD

from tests.engines.engines import Engine, values_of
from tests.nets import mlp


def deepspeed_engine(stage: int) -> Engine:
    """Return DeepSpeed's ZeRO of a stage, 0 to 3, on the CPU."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    # Else it compiles an operator first, for a minute.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    module = mlp()
    optimizer = SGD(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    parameters = list(engine.module.parameters())

    def values() -> Tensor:
        if stage == 0:
            return values_of(parameters)
        return values_of(safe_get_full_fp32_param(each) for each in parameters)

    return Engine(engine, parameters, step, values)


def torchft_ddp() -> Engine:
    """Return torchft's DDP, whose manager averages over all replicas: here the job's ranks, none of which dies."""
    from unittest.mock import MagicMock

    from torchft.ddp import DistributedDataParallel
    from torchft.manager import Manager
    from torchft.work import _DummyWork

    manager = MagicMock(spec=Manager)

    def allreduce(tensor: Tensor, **options: Any) -> Any:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
        return _DummyWork(tensor)

    manager.allreduce = allreduce
    module = mlp()
    model = DistributedDataParallel(manager, module)
    parameters = list(module.parameters())
    optimizer = SGD(parameters, lr=0.1)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Engine(model, parameters, step, partial(values_of, parameters))


def quiet() -> None:
    """Leave other packages' warnings alone, and let DeepSpeed take the CPU."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="gaf_ddp")
