"""What filter_fsdp refuses, in words that say what would work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from gaf_ddp import GAFState, Mean, filter_fsdp
from tests.engines.fsdp_models import Checks, count, network, probes, run, train
from tests.nets import ddp, mlp

Ranks = Callable[..., list[Any]]


def check_errors() -> None:
    """What cannot work is refused, in words that say what would."""
    plain = mlp()
    with pytest.raises(TypeError, match=r"model must be of fully_shard, found Sequential without a unit of it"):
        filter_fsdp(plain, GAFState())
    with pytest.raises(TypeError, match=r"found DistributedDataParallel at the root: use model.register_comm_hook"):
        filter_fsdp(ddp(mlp(), torch.device("cpu")), GAFState())
    with pytest.raises(TypeError, match=r"FSDP2.*found FullyShardedDataParallel in '0'"):
        filter_fsdp(nn.Sequential(FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))), GAFState())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, found function"):
        filter_fsdp(check_errors, GAFState())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state must be a GAFState, found int"):
        filter_fsdp(network(), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scope must be 'bucket' under fully_shard.*found 'model'"):
        filter_fsdp(network(), GAFState(tau=0.5, scope="model"))
    with pytest.raises(ValueError, match=r"wire_dtype must be None under fully_shard.*found torch.bfloat16"):
        filter_fsdp(network(), GAFState(wire_dtype=torch.bfloat16))
    model = network()
    model.set_gradient_divide_factor(3.0)
    filter_fsdp(model, GAFState(weighting=Mean()))
    with pytest.raises(ValueError, match=r"set_gradient_divide_factor is for exchange 'sketch' or 'gather'"):
        train(model, None)
    state = filter_fsdp(network(), GAFState())
    with pytest.raises(ValueError, match=r"state must be new, found one that filters a model already"):
        filter_fsdp(network(), state)


def check_unlike_settings() -> None:
    """A setting that differs is named on every rank, at the first unit and later."""
    rank = dist.get_rank()
    model = probes()
    filter_fsdp(model, GAFState(tau=0.5 + rank / 10))
    with pytest.raises(ValueError, match=r"tau must be the same on every rank, found 0.5 on rank 0 and 0.6 on rank"):
        model(torch.ones(count())).backward()
    model = probes()
    state = filter_fsdp(model, GAFState(tau=0.5))
    model(torch.ones(count())).backward()
    state.tau = 0.5 + rank / 10
    with pytest.raises(ValueError, match=r"tau must be the same on every rank, found 0.5 on rank 0 and 0.6 on rank"):
        model(torch.ones(count())).backward()


def check_tensor_parallel() -> None:
    """Tensor parallel parts of one gradient would be judged apart."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = mlp()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(ValueError, match=r"replica_group.*tensor parallelism spreads over ranks \[\d, \d\]"):
        filter_fsdp(model, GAFState())


class Checkpointed(nn.Module):
    """Two units whose backwards run inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        for part in self.parts:
            fully_shard(part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=True)
        return x


def check_reentrant_checkpoint() -> None:
    """A backward inside of another would end the step for every unit; one step late it is one step."""
    model = Checkpointed()
    fully_shard(model)
    state = filter_fsdp(model, GAFState())
    for _ in range(4):
        model(torch.randn(6, 12, requires_grad=True)).sum().backward()
    assert len(state.decisions) == 1
    assert state.step in (3, 4)  # the last one may end with the next one's first unit
    model = Checkpointed()
    fully_shard(model)
    filter_fsdp(model, GAFState(tau=1.0))
    with pytest.raises(RuntimeError, match=r"one backward, found one inside of another.*use_reentrant=True"):
        model(torch.randn(6, 12, requires_grad=True)).sum().backward()


def check_reduction_outside_of_backward() -> None:
    """Gradients that are reduced outside of a backward, as torch 2.15 can, would be in no step."""
    model = probes()
    filter_fsdp(model, GAFState(tau=1.0))
    if hasattr(model, "set_manual_backward_finalization"):
        model.set_manual_backward_finalization(True)
        model(torch.ones(count())).backward()
        with pytest.raises(RuntimeError, match=r"reduced in backward, found one that is reduced outside"):
            model.finalize_backward()


def check_another_torch() -> None:
    """A torch that lacks a name is told so."""
    model = network()
    unit: Any = model
    group = unit._get_fsdp_state()._fsdp_param_group
    del group.mesh_info
    with pytest.raises(RuntimeError, match=r"torch .* has another fully_shard than 2.11 to 2.15 have: .*mesh_info"):
        filter_fsdp(model, GAFState())


REFUSED: dict[int, Checks] = {
    2: [
        check_errors,
        check_unlike_settings,
        check_another_torch,
        check_reentrant_checkpoint,
        check_reduction_outside_of_backward,
    ],
    4: [check_tensor_parallel],
}


@pytest.mark.parametrize("size", REFUSED)
def test_what_cannot_work_is_refused(gloo_ranks: Ranks, size: int) -> None:
    gloo_ranks(size, run, REFUSED[size])
