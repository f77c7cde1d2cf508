"""Which ranks hold one replica's model, as a DeviceMesh shows beside those that gradients are averaged over."""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gaf_ddp.settings import require

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def replica_group_of(mesh: "DeviceMesh", group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Return a new group of a mesh's dimensions that are not data parallel, None if all are: a collective.

    A group of its own: NCCL does what a group is given one after the other. On the mesh's own one a ballot would wait
    for what the next stage of a pipeline sends, and that for the ballot.

    Args:
        mesh: of all ranks of the job, or of this pipeline.
        group: that gradients are averaged over.

    Raises:
        TypeError: mesh is no DeviceMesh.
        ValueError: some of its dimensions are not those of the group.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, found {type(mesh).__name__}")
    averaged = dist.get_process_group_ranks(group)
    of_dimensions = [dist.get_process_group_ranks(mesh.get_group(dimension)) for dimension in range(mesh.ndim)]
    inside = [dimension for dimension, ranks in enumerate(of_dimensions) if {*ranks} <= {*averaged}]
    others = [dimension for dimension in range(mesh.ndim) if dimension not in inside]
    rule = f"mesh must have the ranks {averaged} that the model's gradients are averaged over as dimensions"
    require(math.prod(map(mesh.size, inside)) == len(averaged), rule, of_dimensions)
    if not others:
        return None
    replicas = mesh.mesh.permute(*inside, *others).reshape(len(averaged), -1).tolist()
    apart = mesh.size() < dist.get_world_size()  # else every rank of the job has to make every group
    groups: list[Any] = [dist.new_group(ranks, use_local_synchronization=apart) for ranks in replicas]
    own: dist.ProcessGroup = next(made for made in groups if made != dist.GroupMember.NON_GROUP_MEMBER)
    # NCCL connects the ranks of a group when it is first used. In a step a stage would wait there for another's step.
    dist.all_reduce(torch.zeros((), device=mesh.device_type), group=own)
    return own
