"""What ranks tell each other, over gloo: text and numbers. Nothing that another rank sends is unpickled."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.runtime.collectives import all_gather_text
from launch.errors import LaunchError

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """Return every rank's value, in rank order; any that JSON can hold."""
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    return [json.loads(text) for text in all_gather_text(json.dumps(value), world, torch.device("cpu"))]


def require_same(values: Mapping[str, str]) -> None:
    """Raise `LaunchError` on every rank, with two ranks' values, if a named value is not the same on all."""
    everyone, unlike = gathered(dict(values)), []
    for name in dict.fromkeys(name for each in everyone for name in each):
        found = [each.get(name, "none") for each in everyone]
        rank = next((rank for rank, other in enumerate(found) if other != found[0]), None)
        if rank is not None:
            two = f"{found[0]} on rank 0 and {found[rank]} on rank {rank}"
            unlike.append(f"{name} must be the same on every rank, found {two}")
    if unlike:
        raise LaunchError("; ".join(unlike))


def summed(*values: float) -> Tensor:
    """Return the sums of numbers over all ranks, as float64."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total


def from_first(value: T) -> T:
    """Return rank 0's value: plain ones, bytes and tensors in lists and dicts. What others pass is not used."""
    first = dist.get_rank() == 0
    tensors: list[Tensor] = []
    packed: Any = _packed(value, tensors) if first else None
    shapes: Any = [[str(each.dtype).split(".")[1], list(each.shape)] for each in tensors]
    packed, shapes = gathered([packed, shapes])[0]
    if not first:
        tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in shapes]
    for tensor in tensors:
        dist.broadcast(tensor.view(-1).view(torch.uint8), 0)
    return value if first else cast(T, _unpacked(packed, tensors))


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """Return the value as JSON can hold it, keys of any kind too, and add its tensors to the list."""
    if isinstance(value, Tensor):
        tensors.append(value.cpu().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, bytes):
        return {"bytes": _packed(torch.tensor(bytearray(value), dtype=torch.uint8), tensors)}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(part, tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_packed(part, tensors) for part in value]}
    return value


def _unpacked(value: Any, tensors: list[Tensor]) -> Any:
    """Return what was packed; tuples have become lists."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "bytes":
        return bytes(_unpacked(content, tensors).tolist())
    if kind == "dict":
        return {key: _unpacked(part, tensors) for key, part in content}
    return [_unpacked(part, tensors) for part in content]
