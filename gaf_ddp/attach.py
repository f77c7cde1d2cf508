"""attach: one call for a model in DDP or of fully_shard, whatever frameworks wrap around it."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from gaf_ddp.engines.fsdp import filter_fsdp, voters_of
from gaf_ddp.engines.fsdp_units import units_of
from gaf_ddp.engines.mesh import replica_group_of
from gaf_ddp.engines.parameters import filter_parameters
from gaf_ddp.given import require_state
from gaf_ddp.hook import gaf_hook
from gaf_ddp.skip import skip_on_disagreement, unwrapped
from gaf_ddp.state import GAFState

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Submodules by which wrappers hold what they wrap: torch.compile's OptimizedModule, Fabric's _FabricModule.
_WRAPPED = ("_orig_mod", "_forward_module")


def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    state: GAFState | None = None,
    mesh: "DeviceMesh | None" = None,
    **settings: Any,
) -> GAFState:
    """Let the gradients of a model in DDP, or of fully_shard, be averages of those that agree.

        state = attach(DistributedDataParallel(model))
        state = attach(DistributedDataParallel(model), optimizer, tau=0.9)
        state = attach(model, mesh=mesh)                                    # beside tensor or pipeline parallelism

    Call it once, on every rank, after the model is wrapped and before the first backward. `gaf_hook`, `filter_fsdp` and
    `filter_parameters` say what their steps cost. `state.summary()` warns if no gradient ever came.

    Args:
        model: a DistributedDataParallel model, or what torch.compile, Fabric's `setup`, Accelerate's `prepare` or
            Hugging Face's `trainer.model_wrapped` make of one; or a model of fully_shard (FSDP2) or `replicate`. FSDP1
            too, with its optimizer (`filter_parameters`).
        optimizer: of this model, also as Accelerate, Fabric or Lightning wrap it: steps on which nothing agrees
            are left out exactly (`skip_on_disagreement`). The consensus rule has none: nothing is added then.
        state: of this model alone; a new one if None.
        mesh: of all ranks. Its dimensions that are not data parallel make `GAFState.replica_group`: a collective.
        **settings: of the new state, see `GAFState`.

    Returns:
        The state. Its process group is the model's.

    Raises:
        TypeError: model, optimizer or state is not what its name says, or there are both state and settings; the
            message says what to use instead.
        ValueError: state's process group is another than the model's, mesh lacks the model's ranks, or there is a
            replica_group beside it; the optimizer steps over no parameter of the model, or a setting is out of its
            range.
        RuntimeError: the model has a communication hook already.
    """
    state = given_or_new(state, settings)
    wrapped = _find(model)
    if optimizer is not None:
        _require_shared(wrapped, unwrapped(optimizer))
    if mesh is not None:
        _set_replica(wrapped, state, mesh)
    _connect(wrapped, state, optimizer)
    state._awaits_hook = True
    if optimizer is not None and can_skip(state):
        skip_on_disagreement(optimizer, state)
    return state


def given_or_new(state: GAFState | None, settings: dict[str, Any]) -> GAFState:
    """Return the state, or a new one of these settings; raise TypeError if there are both."""
    if state is None:
        return GAFState(**settings)
    if settings:
        raise TypeError(f"state and settings exclude each other, found both: {', '.join(settings)}")
    require_state(state)
    return state


def can_skip(state: GAFState) -> bool:
    """Return whether there may be steps on which nothing agrees: not by the consensus rule."""
    return not state._is_consensus


def _find(model: nn.Module) -> nn.Module:
    """Return the model of DDP or fully_shard that is wrapped here; raise TypeError if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    while not isinstance(model, DistributedDataParallel):
        children: dict[str, nn.Module] = dict(model.named_children())
        inner = next((children[name] for name in _WRAPPED if name in children), None)
        if inner is None:
            break
        model = inner
    if isinstance(model, DistributedDataParallel):
        return model
    # It takes a second, which a plain import of gaf_ddp should not.
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel) or _is_replicated(model):
        return model
    reason = _reason_against(model)
    if reason is None and any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    rule = "model must be in DistributedDataParallel, or of fully_shard"
    raise TypeError(f"{rule}, found {type(model).__name__}: {reason or _ADVICE}")


_ADVICE = (
    "wrap it first, and pass what Fabric's setup or Accelerate's prepare returns, or Hugging Face's "
    "trainer.model_wrapped; in one process use MicrobatchFilter"
)


def _reason_against(model: nn.Module) -> str | None:
    """Return what to use instead of a wrapper that takes no filter, None if the model is none."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if type(model).__module__.partition(".")[0] in ("deepspeed", "torchft"):
        return "use filter_parameters(model.module.parameters(), state), and state.advance() after each optimizer step"
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            return f"its {name!r} is in FSDP1: pass that if it is all of the model, else use filter_parameters"
        if isinstance(module, DataParallel):
            return "DataParallel adds gradients in one process: use DistributedDataParallel, a process per device"
        if isinstance(module, DistributedDataParallel):
            return f"its {name!r} is in DistributedDataParallel: pass that, each such part with a state of its own"
    return None


def _is_replicated(model: nn.Module) -> bool:
    """Return whether it is a model of composable `replicate`, which takes a hook as DDP does."""
    return not isinstance(model, DistributedDataParallel) and hasattr(model, "register_comm_hook")


def _connect(model: nn.Module, state: GAFState, optimizer: Optimizer | None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        _filter_fsdp1(model, state, optimizer)
    elif isinstance(model, DistributedDataParallel):
        _register(model, state)
    elif _is_replicated(model):
        model.register_comm_hook(state, gaf_hook)  # type: ignore[operator]
    else:
        filter_fsdp(model, state)


def _filter_fsdp1(model: Any, state: GAFState, optimizer: Optimizer | None) -> None:
    if optimizer is None:
        rule = "optimizer must be that of a model in FSDP1, whose steps end with the optimizer's"
        raise TypeError(f"{rule}, found None: or use filter_parameters, and state.advance()")
    if getattr(model, "_inter_node_pg", None) is not None:
        rule = "model must be sharded over all ranks that it is averaged over, found hybrid shards"
        raise TypeError(f"{rule}: use filter_parameters with the group of all of them")
    units: list[Any] = type(model).fsdp_modules(model)
    flat = [each._handle.flat_param for each in units if each._handle is not None]
    filter_parameters(flat, state, model.process_group, advance_with=optimizer)


def _set_replica(model: Any, state: GAFState, mesh: "DeviceMesh") -> None:
    """Let the state know which ranks hold the rest of this model."""
    if state.replica_group is not None:
        raise ValueError("mesh and replica_group exclude each other, found both")
    if hasattr(model, "process_group"):  # of DDP and FSDP1
        state.replica_group = replica_group_of(mesh, model.process_group)
        return
    state.replica_group = replica_group_of(mesh, voters_of(state, units_of(model)[0]))


def _require_shared(model: nn.Module, optimizer: Optimizer) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if stepped.isdisjoint(id(parameter) for parameter in model.parameters()):
        rule = "optimizer must step over parameters of the model"
        raise ValueError(f"{rule}, found none of them in {type(optimizer).__name__}: make it after fully_shard")


def _register(model: DistributedDataParallel, state: GAFState) -> None:
    theirs: dist.ProcessGroup = model.process_group
    ours = state.process_group
    if ours is not None and ours.group_name != theirs.group_name:
        found = f"{ours.group_name!r} of ranks {dist.get_process_group_ranks(ours)}"
        rule = f"{theirs.group_name!r} of ranks {dist.get_process_group_ranks(theirs)}"
        raise ValueError(f"process_group must be the model's own, {rule}, found {found}")
    try:
        model.register_comm_hook(state, gaf_hook)
    except RuntimeError as error:
        if "called once" not in str(error):
            raise
        rule = "model must have no communication hook yet, found one: DistributedDataParallel takes one for good"
        raise RuntimeError(f"{rule}, so attach once, and pass no other hook to the framework") from error
    if ours is None:
        state.process_group = theirs
