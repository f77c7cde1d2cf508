"""Which ranks tensor parallelism spreads parameters over, as their DTensors show."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from gaf_ddp.settings import require


def tensor_group_of(parameters: Iterable[Tensor], ranks: Iterable[int] = ()) -> dist.ProcessGroup | None:
    """Return the group that parameters are spread over beside those that gradients are averaged over, or None.

    Args:
        parameters: of a model; DTensors, or local parts as DDP makes of them.
        ranks: that FSDP spreads parameters over.

    Raises:
        ValueError: they are spread over several dimensions of a mesh beside that.
    """
    averaged = {*ranks}
    found: dict[str, dist.ProcessGroup] = {}
    for parameter in parameters:
        spec = getattr(parameter, "_st_info", None) or getattr(parameter, "_spec", None)  # as DDP, or torch, has it
        mesh = getattr(spec, "mesh", None)
        if mesh is None:
            continue
        for dimension in range(mesh.ndim):
            group = mesh.get_group(dimension)
            if group.size() > 1 and not {*dist.get_process_group_ranks(group)} <= averaged:
                found[group.group_name] = group
    rule = "parameters must be spread over one dimension of a mesh beside data parallelism"
    require(len(found) <= 1, rule, [dist.get_process_group_ranks(each) for each in found.values()])
    return next(iter(found.values()), None)


def require_replica(named: object, tensor_group: dist.ProcessGroup | None) -> None:
    """Raise ValueError if these are parts of a model that other ranks hold the rest of, and the state names none.

    Their ranks would be judged apart, and what is replicated over them would drift.
    """
    if tensor_group is not None and named is None:
        spread = dist.get_process_group_ranks(tensor_group)
        raise ValueError(
            f"parameters must be whole on every rank, or replica_group name the ranks that hold one replica; found "
            f"some that tensor parallelism spreads over ranks {spread}: use attach(model, mesh=...) or "
            "GAFState(replica_group=...), with the consensus rule"
        )
