"""What trials of the hook found: where a filter goes wrong silently, or hangs; each with the right value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.utils.checkpoint import checkpoint

from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement
from tests.ballots.test_late import alike
from tests.ballots.training import SIZES, TINY, N, train
from tests.gradients import agreeing_gradients
from tests.nets import Probe, assert_replicas_equal, ddp, flat_gradients, flat_parameters, mlp

Ranks = Callable[..., list[Any]]


class Reentrant(nn.Module):
    """Layers whose backwards run inside of another backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True).tanh()
        return x


def train_reentrant(device: torch.device, settings: dict[str, Any], static_graph: bool) -> tuple[int, float]:
    """Return the steps seen in 60 backwards, and how often the turned rank 1 was kept in the last 40."""
    model = ddp(Reentrant(), device, bucket_cap_mb=0.0003, static_graph=static_graph)
    state = GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    target = torch.randn(8, 12, generator=torch.Generator().manual_seed(5)).tanh()
    for step in range(60):
        if step == 20:
            state.summary()
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(8, 12, generator=generator).requires_grad_()
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        (-loss if dist.get_rank() == 1 else loss).backward()
        optimizer.step()
        assert_replicas_equal(model)
    return state.step, state.summary()["gaf/kept_rank_01"]


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("settings", [{}, {"tau": 0.9, "scope": "model"}, {"tau": 0.9}], ids=str)
def test_reentrant_checkpoints_are_one_step_a_backward(
    ranks: Ranks, settings: dict[str, Any], static_graph: bool
) -> None:
    for steps, kept in ranks(4, train_reentrant, settings, static_graph):
        assert steps == 60
        assert kept <= (0.1 if "tau" not in settings else 0.5)


def skip_reentrant(device: torch.device, scope: str) -> float:
    """Return how far parameters moved in steps on which two ranks are opposed."""
    model = ddp(Reentrant(), device, bucket_cap_mb=0.0003)
    state = GAFState(tau=0.9, scope=scope)  # type: ignore[arg-type]
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    skip_on_disagreement(optimizer, state)
    before = flat_parameters(model)
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.ones(8, 12, requires_grad=True)
        (model(x).square().mean() * (1 - 2 * dist.get_rank())).backward()
        optimizer.step()
    return (flat_parameters(model) - before).abs().max().item()


@pytest.mark.parametrize("scope", ["bucket", "model"])
def test_reentrant_checkpoints_skip_exactly(ranks: Ranks, scope: str) -> None:
    assert ranks(2, skip_reentrant, scope) == [0.0, 0.0]


def train_over_a_mesh(device: torch.device) -> str:
    """Return what the hook says of DDP over one dimension of a mesh, and tensor parallelism over the other."""
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    module = parallelize_module(nn.Sequential(nn.Linear(12, 12)), mesh["tp"], {"0": ColwiseParallel()})
    _pre_dp_module_transform(module)
    model, state = nn.parallel.DistributedDataParallel(module, process_group=mesh.get_group("dp")), GAFState()
    state.process_group = mesh.get_group("dp")
    model.register_comm_hook(state, gaf_hook)
    try:
        model(torch.ones(2, 12)).sum().backward()
    except ValueError as error:
        return str(error)
    return "nothing"


def test_tensor_parallel_parameters_are_refused(gloo_ranks: Ranks) -> None:
    for said in gloo_ranks(4, train_over_a_mesh):
        assert said.startswith("parameters must be whole on every rank, or replica_group name the ranks that hold one")


def train_with_waiting_hook(device: torch.device, settings: dict[str, Any]) -> float:
    """Return how far gradients are off the mean under a hook that waits for ours."""

    def waiting(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations other than its own
        result = gaf_hook(state, bucket).wait()
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(result)
        return future

    probe = Probe(SIZES)
    model, state = ddp(probe, device, **TINY), GAFState(**settings)
    model.register_comm_hook(state, waiting)
    off = 0.0
    for seed in range(4):
        gradients = agreeing_gradients(3, N, seed)
        probe.zero_grad()
        model(gradients[dist.get_rank()]).backward()
        off = max(off, (flat_gradients(probe) - gradients.double().mean(0)).abs().max().item())
    return off


@pytest.mark.parametrize("settings", [{}, {"watch": True}, {"tau": 2.0}, {"tau": 2.0, "exchange": "gather"}], ids=str)
def test_a_hook_around_the_hook_may_wait_for_it(gloo_ranks: Ranks, settings: dict[str, Any]) -> None:
    assert max(gloo_ranks(3, train_with_waiting_hook, settings)) < 1e-5


def use_one_state_twice(device: torch.device, settings: dict[str, Any]) -> str:
    """Return what the second model's first backward says."""
    state, models = GAFState(**settings), [ddp(mlp(seed), device) for seed in range(2)]
    for model in models:
        model.register_comm_hook(state, gaf_hook)
    models[0](torch.ones(2, 12)).sum().backward()
    try:
        models[1](torch.ones(2, 12)).sum().backward()
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("settings", [{}, {"tau": 1.0}], ids=str)
def test_one_state_for_two_models_is_refused(gloo_ranks: Ranks, settings: dict[str, Any]) -> None:
    for said in gloo_ranks(2, use_one_state_twice, settings):
        assert said.startswith("state must be of this model: make a GAFState for each model, found gradients")


def freeze_layers(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a model whose first two layers are frozen after DDP wrapped them."""
    model, state = (
        ddp(Probe([50, 60, 70]), device, bucket_cap_mb=0.0001, find_unused_parameters=True),
        GAFState(**settings),
    )
    model.register_comm_hook(state, gaf_hook)
    for part in list(model.module.parts)[:2]:
        part.requires_grad_(False)
    for seed in range(12):
        gradients = agreeing_gradients(3, 180, seed)
        model(gradients[dist.get_rank()]).backward()
    return state.report().as_dict()


@pytest.mark.parametrize("settings", [{}, {"tau": 1.5}, {"tau": 1.5, "scope": "model"}], ids=str)
def test_frozen_layers_leave_nobody_out(gloo_ranks: Ranks, settings: dict[str, Any]) -> None:
    for report in gloo_ranks(3, freeze_layers, settings):
        for rank in report["ranks"]:
            assert (rank["kept"], rank["out_since"], rank["zero"]) == (1, None, 0)


def train_unevenly(device: torch.device, inputs: list[int]) -> tuple[Tensor, int, list[tuple[int, int | None]]]:
    """Train with DDP's Join; return the gradients of the last step, the steps, and zero and out_since of each rank."""
    probe = Probe(SIZES)
    model, state = ddp(probe, device, **TINY), GAFState()
    model.register_comm_hook(state, gaf_hook)
    with model.join():
        for step in range(inputs[dist.get_rank()]):
            probe.zero_grad()
            model(agreeing_gradients(3, N, step)[dist.get_rank()]).backward()
    assert_replicas_equal(probe)
    ranks = state.report().ranks
    return flat_gradients(probe), state.step, [(each.zero, each.out_since) for each in ranks]


def test_joined_ranks_are_finished_and_in_no_divisor(gloo_ranks: Ranks) -> None:
    outcomes = gloo_ranks(3, train_unevenly, [3, 9, 6])
    expected = agreeing_gradients(3, N, 8)[1].double()
    torch.testing.assert_close(outcomes[1][0], expected, rtol=1e-5, atol=1e-5)
    for _, steps, ranks in outcomes:
        assert steps == 9
        assert ranks == [(0, None)] * 3


def accumulate(device: torch.device) -> tuple[int, float]:
    """Return the steps, and how far the gradient of two backwards, one under no_sync, is off."""
    probe = Probe(SIZES)
    model, state = ddp(probe, device, **TINY), GAFState()
    model.register_comm_hook(state, gaf_hook)
    off = 0.0
    for seed in range(3):
        one, other = agreeing_gradients(3, N, 2 * seed), agreeing_gradients(3, N, 2 * seed + 1)
        probe.zero_grad()
        with model.no_sync():
            model(one[dist.get_rank()]).backward()
        model(other[dist.get_rank()]).backward()
        off = max(off, (flat_gradients(probe) - (one + other).double().mean(0)).abs().max().item())
    return state.step, off


def test_no_sync_counts_as_one_gradient(ranks: Ranks) -> None:
    for steps, off in ranks(3, accumulate):
        assert steps == 3
        assert off < 1e-5


def assign_unlike(device: torch.device, name: str) -> list[str]:
    """Return what backwards say where rank 1 is assigned another setting after the second one."""
    model, state = ddp(Probe(SIZES), device, **TINY), GAFState()
    model.register_comm_hook(state, gaf_hook)
    said = []
    for step in range(4):
        if step == 2 and dist.get_rank() == 1:
            setattr(state, name, {"max_norm_ratio": 3.0, "start_step": 7, "watch": True}[name])
        try:
            model(agreeing_gradients(3, N, step)[dist.get_rank()]).backward()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
            break
    return said


@pytest.mark.parametrize("name", ["max_norm_ratio", "start_step", "watch"])
def test_settings_assigned_unlike_are_told_on_every_rank_a_step_later(gloo_ranks: Ranks, name: str) -> None:
    for rank, said in enumerate(gloo_ranks(3, assign_unlike, name)):
        assert said[:3] == ["nothing"] * 3
        assert said[3].startswith(f"{name} must be the same on every rank, found")
        assert f"on this rank, {rank}; ranks 1 have another than rank 0" in said[3]


def vote_by_hosts(device: torch.device, bad: list[int]) -> list[list[bool]]:
    """Return who is kept over steps where three hosts have 2, 2 and 1 ranks."""
    from gaf_ddp.runtime import hosts

    names = ["a", "a", "b", "b", "c"]
    hosts.socket.gethostname = lambda: names[dist.get_rank()]  # type: ignore[attr-defined]
    model, state = ddp(Probe(SIZES), device, **TINY), GAFState(voters="host")
    model.register_comm_hook(state, gaf_hook)
    kept: list[list[bool]] = []
    for seed in range(12):
        gradients = agreeing_gradients(5, N, seed)
        gradients[bad] *= -1
        model.zero_grad()
        model(gradients[dist.get_rank()]).backward()
        if kept:
            expected = gradients[torch.tensor(kept[-1])].double().mean(0)
            torch.testing.assert_close(flat_gradients(model), expected, rtol=1e-5, atol=1e-5)
        assert state.agreement is not None
        kept.append(state.agreement.kept.tolist())
    return kept


def test_hosts_vote_as_one(gloo_ranks: Ranks) -> None:
    for kept in gloo_ranks(5, vote_by_hosts, [2, 3]):
        assert kept[-1] == [True, True, False, False, True]


def test_a_part_with_a_nan_takes_its_bucket_out_and_no_other(ranks: Ranks) -> None:
    gradients = alike(3, 4)
    gradients[2, 0, 400] = torch.nan  # in one of two buckets
    for trained in ranks(3, train, gradients, {}):
        expected = gradients[2].double().mean(0)
        expected[311:] = gradients[2, 1:, 311:].double().mean(0)
        assert (trained.gradients[2] - expected).norm() < 1e-6 * expected.norm()


class Waves(nn.Module):
    """Complex parameters of both widths between real ones; DDP makes buckets of one dtype each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        dtypes = [torch.complex64, torch.float32, torch.complex128, torch.complex64]
        self.parts = nn.ParameterList(torch.randn(70, dtype=dtype, generator=generator) for dtype in dtypes)

    def forward(self, factors: Tensor) -> Tensor:
        products = [(part * factor).abs().square().sum() for part, factor in zip(self.parts, factors, strict=True)]
        return torch.stack([product.double() for product in products]).sum()


def average_waves(device: torch.device, settings: dict[str, Any], turned: int | None) -> tuple[float, int]:
    """Return how far complex gradients are off the mean of the ranks, a turned one left out, and the steps."""
    model, state = ddp(Waves(), device, bucket_cap_mb=0.0005), GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    off = 0.0
    for step in range(6):
        factors = 1 + 0.1 * torch.rand(4, 4, generator=torch.Generator().manual_seed(step))
        signs = torch.ones(4) if turned is None else 1 - 2 * (torch.arange(4) == turned).float()
        model.zero_grad()
        (model(factors[dist.get_rank()].to(device)) * signs[dist.get_rank()]).backward()
        if turned is None or step == 5:
            scale = factors[signs > 0].square().mean(0)
            for part, each in zip(model.module.parts, scale, strict=True):
                off = max(off, (part.grad - 2 * part.detach() * each).abs().max().item())
    return off, state.step


@pytest.mark.parametrize("settings", [{}, {"check_every": 1}, {"watch": True}, {"tau": 2.0}], ids=str)
def test_complex_gradients_are_averaged(ranks: Ranks, settings: dict[str, Any]) -> None:
    for off, steps in ranks(4, average_waves, settings, None):
        assert off < 1e-4
        assert steps == 6


@pytest.mark.parametrize("settings", [{}, {"tau": 0.5}], ids=str)
def test_a_turned_rank_with_complex_gradients_is_left_out(ranks: Ranks, settings: dict[str, Any]) -> None:
    for off, _ in ranks(4, average_waves, settings, 1):
        assert off < 1e-4
