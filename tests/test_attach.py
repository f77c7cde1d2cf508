"""attach: what it finds inside of wrappers, what it passes on, and what it says where it cannot work."""

import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel
from torch.optim import SGD

from gaf_ddp import GAFState, NeighborhoodAgreement, attach, gaf_hook
from tests.nets import Probe, assert_replicas_equal, batches, ddp, mlp

with warnings.catch_warnings():  # torch 2.11 deprecates what this module of its own uses
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.optim import ZeroRedundancyOptimizer

Ranks = Callable[..., list[Any]]


class Holder(nn.Module):
    """What Fabric does with a model, in short."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._forward_module = inner

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)


class Around(torch.optim.Optimizer):
    """What Accelerate does with an optimizer, in short: no hooks of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def _raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def finds(device: torch.device) -> None:
    """Every wrapper: the state is that of the model inside, which has the hook then."""
    wrappers: dict[str, Callable[[nn.Module], Any]] = {
        "plain": lambda model: model,
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "held": Holder,
        "held, compiled": lambda model: Holder(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    }
    for name, wrap in wrappers.items():
        model = wrap(ddp(mlp(), device))
        state = attach(model)
        for inputs, targets in batches(dist.get_rank(), 2):
            nn.functional.cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
        assert state.step == 2, name
        assert state.process_group is dist.group.WORLD
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert state.summary()["gaf/kept_fraction"] > 0


def passes_the_group(device: torch.device) -> str:
    """The state has DDP's own group; another one is refused, with both named, and the model has no hook then."""
    pairs = [dist.new_group([2 * i, 2 * i + 1]) for i in range(dist.get_world_size() // 2)]
    own = pairs[dist.get_rank() // 2]
    probe = Probe([40])
    model = ddp(probe, device, process_group=own)
    message = _raised(ValueError, lambda: attach(model, process_group=dist.group.WORLD))
    state = attach(model, tau=2.0)
    assert state.process_group is own
    assert attach(ddp(Probe([3]), device, process_group=own), process_group=own).process_group is own
    model(torch.full((40,), 1.0 + dist.get_rank(), device=device)).backward()
    torch.testing.assert_close(probe.parts[0].grad, torch.full((40,), 1.5 + dist.get_rank() // 2 * 2))
    assert pickle.loads(pickle.dumps(GAFState(tau=1.0))).tau == 1.0
    return message


def skips(device: torch.device) -> None:
    """The optimizer inside of wrappers leaves out what disagrees; the consensus rule needs none."""
    for wrap in (lambda optimizer: optimizer, Around, lambda optimizer: Around(Around(optimizer))):
        probe = Probe([30, 7])
        model = ddp(probe, device)
        optimizer = wrap(SGD(probe.parameters(), lr=0.1, weight_decay=0.1))
        before = [parameter.clone() for parameter in probe.parameters()]
        attach(model, optimizer, weighting=NeighborhoodAgreement(0.5))
        for agree in (False, True):
            sign = 1.0 if agree or dist.get_rank() == 0 else -1.0
            optimizer.zero_grad()
            model(sign * torch.ones(37)).backward()
            optimizer.step()
            moved = any(not torch.equal(p, q) for p, q in zip(probe.parameters(), before, strict=True))
            assert moved == agree
        assert_replicas_equal(probe)
    model = ddp(Probe([5]), device)
    optimizer = SGD(model.parameters())
    attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    model = ddp(Probe([5]), device)
    assert attach(model, ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1), tau=1.0)._records.followers


def shards(device: torch.device) -> None:
    """A model of fully_shard goes to filter_fsdp; the optimizer must be of its sharded parameters."""
    model = mlp()
    stale = SGD(model.parameters())
    for layer in (0, 2):
        fully_shard(model[layer])
    fully_shard(model)
    message = _raised(ValueError, lambda: attach(model, stale, tau=1.0))
    assert "optimizer must step over parameters of the model" in message
    state = attach(model, SGD(model.parameters()), tau=1.0)
    with pytest.warns(UserWarning, match="attached, but no gradient came"):
        state.summary()
    inputs, targets = batches(dist.get_rank(), 1)[0]
    nn.functional.cross_entropy(model(inputs), targets).backward()
    assert (state.step, len(state.decisions)) == (1, 3)


def warns_once(device: torch.device) -> None:
    """The first summary says that the hook never ran; later ones, and states not attached, say nothing."""
    bare = mlp()
    state = attach(ddp(bare, device))
    inputs, targets = batches(dist.get_rank(), 1)[0]
    nn.functional.cross_entropy(bare(inputs), targets).backward()  # not through DDP
    with pytest.warns(UserWarning, match="gaf_ddp: attached, but no gradient came"):
        state.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.summary()
        GAFState().summary()


def refuses(device: torch.device) -> dict[str, str]:
    """Return what it says where it cannot work."""
    model = ddp(mlp(), device)
    attach(model)
    hooked = ddp(mlp(), device)
    hooked.register_comm_hook(None, lambda_hook)
    engine = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated, and this machine may have no GPU
        fsdp1 = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    return {
        "twice": _raised(RuntimeError, lambda: attach(model)),
        "another hook": _raised(RuntimeError, lambda: attach(hooked)),
        "fsdp1": _raised(TypeError, lambda: attach(fsdp1)),
        "inside fsdp1": _raised(TypeError, lambda: attach(nn.Sequential(fsdp1))),
        "parallel": _raised(TypeError, lambda: attach(DataParallel(nn.Linear(2, 2)))),
        "deepspeed": _raised(TypeError, lambda: attach(engine)),
        "bare": _raised(TypeError, lambda: attach(mlp())),
        "inside": _raised(TypeError, lambda: attach(nn.Sequential(ddp(mlp(), device)))),
        "no module": _raised(TypeError, lambda: attach(3)),  # type: ignore[arg-type]
        "no state": _raised(TypeError, lambda: attach(ddp(mlp(), device), state=3)),  # type: ignore[arg-type]
        "both": _raised(TypeError, lambda: attach(ddp(mlp(), device), state=GAFState(), tau=1.0)),
        "no optimizer": _raised(TypeError, lambda: attach(ddp(mlp(), device), 3)),  # type: ignore[arg-type]
        "foreign optimizer": _raised(ValueError, lambda: attach(ddp(mlp(), device), SGD(mlp().parameters()))),
        "setting": _raised(ValueError, lambda: attach(ddp(mlp(), device), tau=3.0)),
    }


def hooks_itself(device: torch.device) -> int:
    """What composable `replicate` makes takes the hook as DDP does."""
    model = replicate(mlp())
    state = attach(model)
    for inputs, targets in batches(dist.get_rank(), 3):
        nn.functional.cross_entropy(model(inputs), targets).backward()
    assert_replicas_equal(model)
    return state.step


def shards_as_fsdp1(device: torch.device) -> None:
    """FSDP1's steps end with the optimizer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated, and this machine may have no GPU
        for original in (False, True):
            model = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"), use_orig_params=original)
            optimizer = SGD(model.parameters())
            state = attach(model, optimizer)
            for inputs, targets in batches(dist.get_rank(), 3):
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            assert state.step == 3
            assert state.agreement is not None
            assert state.agreement.kept.all()


def lambda_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


REFUSED = {
    "twice": "model must have no communication hook yet, found one: .* attach once",
    "another hook": "model must have no communication hook yet, found one",
    "fsdp1": r"optimizer must be that of a model in FSDP1.*found None: or use filter_parameters, and state.advance\(\)",
    "inside fsdp1": r"found Sequential: its '0' is in FSDP1: pass that",
    "parallel": "found DataParallel: .*use DistributedDataParallel, a process per device",
    "deepspeed": r"DeepSpeedEngine: use filter_parameters\(model.module.parameters\(\), state\), and state.advance\(\)",
    "bare": "found Sequential: wrap it first.*Accelerate's prepare.*trainer.model_wrapped.*MicrobatchFilter",
    "inside": "found Sequential: its '0' is in DistributedDataParallel: pass that",
    "no module": "model must be a torch.nn.Module, found int",
    "no state": "state must be a GAFState, found int",
    "both": "state and settings exclude each other, found both: tau",
    "no optimizer": "optimizer must be a torch.optim.Optimizer, found int",
    "foreign optimizer": "optimizer must step over parameters of the model, found none of them in SGD",
    "setting": r"tau must be .*\[0, 2\].* found 3.0",
}


def on_two_ranks(device: torch.device) -> dict[str, str]:
    for check in (finds, skips, warns_once):
        check(device)
    if device.type == "cpu":
        shards(device)
        shards_as_fsdp1(device)
        assert hooks_itself(device) == 3
        return refuses(device)
    return {}


def test_two_ranks(gloo_ranks: Ranks) -> None:
    for messages in gloo_ranks(2, on_two_ranks):
        for name, pattern in REFUSED.items():
            assert re.search(pattern, messages[name]), f"{name}: {messages[name]}"


def test_the_group_is_the_models(gloo_ranks: Ranks) -> None:
    for rank, message in enumerate(gloo_ranks(4, passes_the_group)):
        own, world = ("[0, 1]", "[2, 3]")[rank // 2], "[0, 1, 2, 3]"
        assert re.search(f"process_group must be the model's own, .*{re.escape(own)}.*{re.escape(world)}", message)


def test_a_hook_that_refuses_leaves_nothing_behind(gloo_ranks: Ranks) -> None:
    assert gloo_ranks(1, after_a_refusal) == [None]


def after_a_refusal(device: torch.device) -> None:
    """A refused call changes neither model, optimizer nor state."""
    model = ddp(mlp(), device)
    state, optimizer = GAFState(tau=1.0), SGD(model.parameters())
    model.register_comm_hook(GAFState(), gaf_hook)
    _raised(RuntimeError, lambda: attach(model, optimizer, state=state))
    assert state.process_group is None
    assert not state._records.followers
    assert not optimizer._optimizer_step_pre_hooks
