"""What filter_parameters is given, what its hooks are shown of gradients, and how engines that show none are found."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from gaf_ddp.settings import require


def trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return those that have gradients; raise what `filter_parameters` promises where there are none."""
    rule = "parameters must be tensors, as model.parameters() gives them"
    if isinstance(parameters, (Tensor, nn.Module)):
        raise TypeError(f"{rule}, found a {type(parameters).__name__}")
    found = list(parameters)
    wrong = [type(each).__name__ for each in found if not isinstance(each, Tensor)]
    if wrong:
        raise TypeError(f"{rule}, found a {wrong[0]}")
    found = [each for each in found if each.requires_grad]
    require(bool(found), "parameters must hold some that require gradients", found)
    devices = sorted({str(each.device) for each in found})
    require(len(devices) == 1, "parameters must be on one device", devices)
    return found


def as_vector(gradient: Tensor) -> Tensor:
    """Return what this rank has of a gradient as a vector of real numbers, in its own memory where that can be."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return (torch.view_as_real(local) if local.is_complex() else local).detach().reshape(-1)


def like(gradient: Tensor, vector: Tensor) -> Tensor:
    """Return a vector in the shape, and as the kind of tensor, that the gradient is."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    found = torch.view_as_complex(vector.view(-1, 2)) if local.is_complex() else vector
    found = found.view(local.shape)
    if local is gradient:
        return found
    from torch.distributed.tensor import DTensor

    assert isinstance(gradient, DTensor)
    mesh, placements = gradient.device_mesh, gradient.placements
    return DTensor.from_local(found, mesh, placements, run_check=False, shape=gradient.shape, stride=gradient.stride())


def is_part(parameter: Tensor) -> bool:
    """Return whether this rank has but a part of a parameter: of FSDP1, FSDP2, tensor parallelism or ZeRO 3."""
    return any(hasattr(parameter, name) for name in ("_is_flat_param", "to_local", "ds_id"))


def require_shown(parameter: Tensor, gradient: Tensor) -> None:
    """Raise RuntimeError, or TypeError, unless this is the parameter's gradient, and one that can be filtered."""
    if getattr(parameter, "grad_added_to_main_grad", False):
        raise RuntimeError(
            "filter_parameters must see gradients before the engine does, found one that a fused kernel has added to "
            "main_grad already: turn gradient accumulation fusion off"
        )
    if gradient.layout != torch.strided:
        raise TypeError("gradients must be dense, found a sparse one, as nn.Embedding(sparse=True) makes")
    if gradient.requires_grad:
        raise RuntimeError("gradients must have no graph of their own, found one of a backward with create_graph=True")
    if gradient.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("backward must not be captured in a CUDA graph: replays would not call the hooks")


def require_seen(parameters: Sequence[Tensor], seen: Collection[int]) -> None:
    """Raise RuntimeError if parameters have gradients, but no hook saw one: at host syncs, of those alone."""
    missed = [number for number, each in enumerate(parameters) if number not in seen and _has_gradient(each)]
    if missed:
        shape = tuple(parameters[missed[0]].shape)
        found = f"{len(missed)} of {len(parameters)} with one that no hook saw, the first is number {missed[0]} {shape}"
        raise RuntimeError(
            f"filter_parameters must see every parameter's gradient, found {found}: fully_shard calls no hooks (use "
            "filter_fsdp), and gradient accumulation fusion writes main_grad by itself (turn it off)"
        )


def _has_gradient(parameter: Tensor) -> bool:
    found = [parameter.grad, getattr(parameter, "main_grad", None)]
    return any(each is not None and bool(as_vector(each).any()) for each in found)
