"""Which ranks hold one replica's model, as a DeviceMesh shows beside those that gradients are averaged over."""

from typing import TYPE_CHECKING

import torch.distributed as dist

from gaf_ddp.settings import require

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def replica_group_of(mesh: "DeviceMesh", group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Return the group of a mesh's dimensions that are not data parallel, None if all are; a collective for several.

    Args:
        mesh: of all ranks of the job, or of this pipeline.
        group: that gradients are averaged over.

    Raises:
        TypeError: mesh is no DeviceMesh.
        ValueError: some of its dimensions are not those of the group, or several others have no names.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, found {type(mesh).__name__}")
    averaged = dist.get_process_group_ranks(group)
    of_dimensions = [dist.get_process_group_ranks(mesh.get_group(dimension)) for dimension in range(mesh.ndim)]
    inside = [{*ranks} <= {*averaged} for ranks in of_dimensions]
    size = 1
    for dimension, is_inside in enumerate(inside):
        size *= mesh.size(dimension) if is_inside else 1
    rule = f"mesh must have the ranks {averaged} that the model's gradients are averaged over as dimensions"
    require(size == len(averaged), rule, of_dimensions)
    others = [dimension for dimension in range(mesh.ndim) if not inside[dimension]]
    if not others:
        return None
    if len(others) == 1:
        found: dist.ProcessGroup = mesh.get_group(others[0])
        return found
    names = mesh.mesh_dim_names
    if names is None:
        rule = "mesh must have mesh_dim_names where several dimensions are not data parallel"
        raise ValueError(f"{rule}, found none beside dimensions {others}")
    return mesh[tuple(names[each] for each in others)]._flatten().get_group()
