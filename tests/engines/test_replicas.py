"""Replicas of several ranks: tensor parallel ones under DDP and fully_shard, and stages of a pipeline."""

import math
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp import GAFState, attach, filter_fsdp, filter_parameters, gaf_hook
from tests.engines.engines import batch
from tests.marks import job_but
from tests.nets import assert_replicas_equal, mlp, world

Ranks = Callable[..., list[Any]]
BAD = 1  # the data parallel rank that is turned


class Shared(nn.Module):
    """Tensor parallel layers around parameters that are replicated over tensor parallel ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(12, 32), nn.LayerNorm(12)
        self.second, self.last = nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.norm(x + self.second(torch.relu(self.first(x)))))
        return outputs


PLAN = {"first": ColwiseParallel(), "second": RowwiseParallel()}


def mesh_of(kind: str = "fsdp") -> DeviceMesh:
    """Return a mesh of all ranks, two to a replica; under HSDP its shards, and their replicas, are two dimensions."""
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))


def made(kind: str, mesh: DeviceMesh) -> Any:
    """Return the model under DDP or fully_shard, tensor parallel over the mesh's last dimension."""
    model: Any = Shared()
    parallelize_module(model, mesh["tensor"], PLAN)
    if kind == "ddp":
        return DistributedDataParallel(model, device_mesh=mesh["data"], bucket_cap_mb=0.002)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped")  # of views, which DTensors' linear layers return
    data = mesh["replicate", "shard"] if kind == "hsdp" else mesh["data"]
    for unit in (model.first, model.second):
        fully_shard(unit, mesh=data)
    fully_shard(model, mesh=data)
    return model


def assert_equal_over(group: dist.ProcessGroup, tensors: list[Tensor]) -> None:
    """Assert that all ranks of the group have the same bits."""
    assert_replicas_equal(nn.ParameterList([nn.Parameter(each, requires_grad=False) for each in tensors]), group)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def replicated(model: nn.Module) -> list[Tensor]:
    """Return this rank's part of what is replicated over tensor parallel ranks."""
    inner: Any = getattr(model, "module", model)
    return [local(each) for part in (inner.norm, inner.last) for each in part.parameters()] + [local(inner.second.bias)]


def train(device: torch.device, kind: str, steps: int) -> tuple[list[list[bool]], list[float], float]:
    """Return who was kept in each step, z at last, and the last loss, of a job whose data rank 1 is turned."""
    mesh = mesh_of(kind)
    model = made(kind, mesh)
    data = dist.get_rank() // 2
    state = attach(model, mesh=mesh)
    replica = mesh["tensor"].get_group()
    assert state.replica_group not in (None, replica)  # NCCL would do the model's work and the ballot's in order
    assert dist.get_process_group_ranks(state.replica_group) == dist.get_process_group_ranks(replica)
    parameters = list(model.parameters())  # DTensors under DDP leave the module with its first forward
    # Slowly: who has learned all there is has gradients of noise, and turned noise is no fault.
    optimizer = torch.optim.SGD(parameters, lr=6 / steps)
    kept = []
    for step in range(steps):
        inputs, labels = batch(data, step)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        spoilt = math.nan if data == 2 and step == 6 else 20 if data == 2 and step == 9 else 1
        (loss * spoilt * (-1 if data == BAD else 1)).backward()
        optimizer.step()
        if kind == "ddp":
            assert_equal_over(mesh["data"].get_group(), parameters)
        if kind == "hsdp":
            assert_equal_over(mesh["replicate"].get_group(), [local(each) for each in parameters])
        assert_equal_over(mesh["tensor"].get_group(), replicated(model))
        if step > 1:
            assert state.agreement is not None
            kept.append(state.agreement.kept.tolist())
    assert state.agreement is not None
    assert state.agreement.distance is not None
    return kept, state.agreement.distance.tolist(), loss.item()


def assert_one_is_out(outcomes: list[Any]) -> None:
    for each in outcomes:
        assert each[:2] == outcomes[0][:2]  # all ranks of all replicas report the same
    kept = torch.tensor(outcomes[0][0]).double()
    assert kept[len(kept) // 2 :, BAD].mean() <= 0.1, outcomes[0][1]
    assert kept[:, [0, 2, 3]].mean() >= 0.9


CASES = [*product(("ddp", "fsdp"), (60, 500)), ("hsdp", 60)]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("kind", "steps"), job_but(("fsdp", 60), of=CASES), ids=str)
def test_tensor_parallel_replicas_have_one_verdict_and_do_not_drift(gloo_ranks: Ranks, kind: str, steps: int) -> None:
    assert_one_is_out(gloo_ranks(8, train, kind, steps, timeout=380))


def train_stages(device: torch.device, steps: int, parameters: bool) -> tuple[list[list[bool]], list[float], float]:
    """Train two stages of four replicas, by hand; return who was kept, z at last, and the loss."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("data", "stage"))
    data, stage = mesh["data"].get_local_rank(), mesh["stage"].get_local_rank()
    group, replica = mesh["data"].get_group(), mesh["stage"].get_group()
    model = mlp()
    part: Any = model[:3] if stage == 0 else model[3:]
    wrapped = DistributedDataParallel(part, process_group=group)
    if parameters:
        filter_parameters(part.parameters(), state := GAFState(group, replica_group=replica))
    else:
        state = attach(wrapped, mesh=mesh)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    kept, loss = [], torch.zeros(())
    for step in range(steps):
        optimizer.zero_grad()
        inputs, labels = batch(data, step)
        if stage == 0:
            hidden = wrapped(inputs)
            dist.send(hidden.detach(), group=replica, group_dst=1)
            gradient = torch.empty_like(hidden)
            dist.recv(gradient, group=replica, group_src=1)
            hidden.backward(gradient)
        else:
            received = torch.empty(len(inputs), 30)
            dist.recv(received, group=replica, group_src=0)
            received.requires_grad_()
            loss = nn.functional.cross_entropy(wrapped(received), labels)
            (-loss if data == BAD else loss).backward()
            assert received.grad is not None
            dist.send(received.grad, group=replica, group_dst=0)
        optimizer.step()
        if parameters:
            state.advance()
        assert_replicas_equal(part, group)
        if step > 1:
            assert state.agreement is not None
            kept.append(state.agreement.kept.tolist())
    assert state.agreement is not None
    assert state.agreement.distance is not None
    return kept, state.agreement.distance.tolist(), loss.item()


@pytest.mark.parametrize("parameters", [False, True], ids=["attach", "filter_parameters"])
def test_stages_of_a_pipeline_have_one_verdict(gloo_ranks: Ranks, parameters: bool) -> None:
    assert_one_is_out(gloo_ranks(8, train_stages, 50, parameters))


def all_kept(device: torch.device, kind: str) -> None:
    """With all kept it is the engine's own result."""
    mesh, found = mesh_of(), []
    data = mesh["data"].get_local_rank()
    for filtered in (False, True):
        model = made(kind, mesh)
        if filtered:
            state = attach(model, mesh=mesh)
        elif kind == "ddp":
            model.register_comm_hook(mesh["data"].get_group(), allreduce_hook)
        parameters = list(model.parameters())  # DTensors under DDP leave the module with its first forward
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for step in range(4):
            inputs, labels = batch(data, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        found.append(torch.cat([local(each).flatten() for each in parameters]))
    assert state.agreement is not None
    assert state.agreement.kept.all()
    assert not state.agreement.overlong.any()
    assert torch.equal(*found), (found[0] - found[1]).abs().max()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_where_all_count_it_is_the_engines_own(gloo_ranks: Ranks, kind: str) -> None:
    gloo_ranks(4, all_kept, kind)


def errors(device: torch.device) -> None:
    """What is not known is refused by name."""
    mesh = mesh_of()
    inputs, labels = batch(0, 0)
    model = made("ddp", mesh)
    model.register_comm_hook(GAFState(), gaf_hook)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    with pytest.raises(ValueError, match=r"process_group must be the model's own"):
        loss.backward()
    model = made("ddp", mesh)
    model.register_comm_hook(GAFState(mesh["data"].get_group()), gaf_hook)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    with pytest.raises(ValueError, match=r"replica_group.*spreads over ranks \[\d, \d\]: use attach\(model, mesh="):
        loss.backward()
    with pytest.raises(ValueError, match=r"replica_group.*spreads over ranks"):
        filter_fsdp(made("fsdp", mesh), GAFState())
    tensor: Any = mesh["tensor"].get_group()
    with pytest.raises(ValueError, match=r"replica_group is for the consensus rule"):
        GAFState(tau=0.9, replica_group=tensor)
    with pytest.raises(ValueError, match=r"voters must be 'rank' beside replica_group"):
        GAFState(voters="host", replica_group=tensor)
    with pytest.raises(ValueError, match=r"replica_group must be a torch.distributed.ProcessGroup"):
        GAFState(replica_group=3)  # type: ignore[arg-type]
    plain = mlp()
    with pytest.raises(ValueError, match=r"no other rank of those that gradients are averaged over, found \["):
        filter_parameters(plain.parameters(), GAFState(replica_group=world()))
    with pytest.raises(ValueError, match=r"mesh must have the ranks \[0, 1, 2, 3\] .* as dimensions"):
        attach(DistributedDataParallel(mlp()), mesh=mesh["tensor"])
    with pytest.raises(TypeError, match=r"mesh must be a DeviceMesh, found int"):
        attach(DistributedDataParallel(mlp()), mesh=3)  # type: ignore[arg-type]


def test_what_is_not_known_is_refused(gloo_ranks: Ranks) -> None:
    gloo_ranks(4, errors)


def unlike(device: torch.device) -> None:
    """Ranks of one replica that were told unlike things say so, two steps late."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    state = GAFState(mesh["data"].get_group(), replica_group=mesh["stage"].get_group())
    model = mlp()
    filter_parameters(model.parameters(), state)
    state.max_norm_ratio = 5.0 + mesh["stage"].get_local_rank()
    for step in range(2):
        model(batch(0, step)[0]).sum().backward()
        state.advance()
    with pytest.raises(ValueError, match=r"must be the same on all ranks of a replica"):
        state.summary()


def test_ranks_of_a_replica_must_be_told_alike(gloo_ranks: Ranks) -> None:
    gloo_ranks(4, unlike)
