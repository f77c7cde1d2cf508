"""The units of a model of fully_shard: all that is asked of torch beyond its documented names, in one place.

From torch 2.11 to 2.15: `FSDPModule._get_fsdp_state`; of a state `_fsdp_param_groups`, in 2.11 one `_fsdp_param_group`,
and `_state_ctx.post_backward_final_callback_queued`; of a group `fsdp_params` with their `sharded_param`, `mesh_info`
with `mesh` (its `_flatten`), `shard_mesh_dim` and `replicate_mesh_dim`, `_reduce_scatter_comm`,
`_reduce_scatter_process_group` and `_all_reduce_hook`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Unit:
    """What one call of fully_shard made: parameters whose gradients are reduce-scattered together.

    Attributes:
        name: of the first of its modules, as in `model.named_modules()`.
        is_replicated: whether torch adds up over replicas what has been reduce-scattered (HSDP).
        shards: the group that reduce-scatters, the ranks that the parameters are sharded over.
        ranks: all ranks that have a gradient of them, with replicas more than those.
        reduce_scatter: what its gradients are reduce-scattered by now, as `FSDPModule.set_custom_reduce_scatter`
            takes it.
    """

    def __init__(self, name: str, module: Any, state: Any, group: Any) -> None:
        self.name = name
        self._module, self._state, self._group = module, state, group
        info = group.mesh_info
        self.is_replicated = info.replicate_mesh_dim is not None
        if info.shard_mesh_dim is None or (self.is_replicated and info.mesh.size(info.shard_mesh_dim) == 1):
            rule = "model must be sharded over more than one rank"
            raise ValueError(f"{rule}, found replicas alone {_of(name)}: use DistributedDataParallel")
        self.shards: dist.ProcessGroup = group._reduce_scatter_process_group
        ranks = info.mesh.mesh.flatten().tolist() if self.is_replicated else dist.get_process_group_ranks(self.shards)
        self.ranks: list[int] = sorted(ranks)
        self.reduce_scatter: Any = group._reduce_scatter_comm

    def everyone(self) -> dist.ProcessGroup:
        """Return the group of `ranks`: the shards', the default one, or a new one, for which it is a collective."""
        if not self.is_replicated:
            return self.shards
        default = dist.group.WORLD
        if default is not None and dist.get_process_group_ranks(default) == self.ranks:
            return default
        with guarded():
            group: dist.ProcessGroup = self._group.mesh_info.mesh._flatten().get_group()
            return group

    @property
    def parameters(self) -> list[Tensor]:
        """The sharded parameters, those that an optimizer has."""
        with guarded():
            return [parameter.sharded_param for parameter in self._group.fsdp_params]

    @property
    def in_backward(self) -> bool:
        """Whether gradients of the model may still come in this backward."""
        with guarded():
            queued: bool = self._state._state_ctx.post_backward_final_callback_queued
            return queued

    def set_reduce_scatter(self, reduce_scatter: Any) -> None:
        """Let gradients be reduce-scattered by this; one rank alone reduce-scatters nothing."""
        self._module.set_custom_reduce_scatter(reduce_scatter)

    def set_hook(self, hook: Callable[[Tensor], object]) -> None:
        """Let this see the gradient of a rank that is alone, before another such hook."""
        other = self._group._all_reduce_hook

        def both(gradient: Tensor) -> None:
            hook(gradient)
            if other is not None:
                other(gradient)

        self._module.set_all_reduce_hook(both)


def units_of(model: nn.Module) -> list[Unit]:
    """Return the units of a model, in the order of its modules.

    Raises:
        TypeError: there are none.
        ValueError: one has parameters on several meshes, is replicated and not sharded, or on other ranks than
            the first.
        RuntimeError: this torch is made in another way.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # seconds, where it is not needed

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    units: list[Unit] = []
    states: list[object] = []
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(f"model must be of fully_shard (FSDP2), found FullyShardedDataParallel {_of(name)}")
        if isinstance(module, DistributedDataParallel):
            raise TypeError(
                f"model must be of fully_shard, found DistributedDataParallel {_of(name)}: "
                "use model.register_comm_hook(state, gaf_hook)"
            )
        if isinstance(module, FSDPModule):
            with guarded():
                state: Any = module._get_fsdp_state()  # one for all modules of fully_shard([a, b])
                groups = [getattr(state, "_fsdp_param_group", None)]
                groups = getattr(state, "_fsdp_param_groups", groups)
                if len(groups) > 1:
                    raise ValueError(f"a unit must have one mesh, found {len(groups)} {_of(name)}")
                if groups and groups[0] is not None and all(state is not known for known in states):
                    states.append(state)
                    units.append(Unit(name, module, state, groups[0]))
    if not units:
        raise TypeError(f"model must be of fully_shard, found {type(model).__name__} without a unit of it")
    for unit in units:
        if unit.ranks != units[0].ranks:
            found = f"{units[0].ranks} {_of(units[0].name)} and {unit.ranks} {_of(unit.name)}"
            raise ValueError(f"all units must be on the same ranks, found {found}")
    return units


@contextmanager
def guarded() -> Iterator[None]:
    """Say what is wrong where this torch lacks a name."""
    try:
        yield
    except AttributeError as error:
        raise RuntimeError(
            f"gaf_ddp: torch {torch.__version__} has another fully_shard than 2.11 to 2.15 have: {error}"
        ) from error


def _of(name: str) -> str:
    return f"in {name!r}" if name else "at the root"
