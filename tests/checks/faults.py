"""Faults that tests of the checks make, and what is said of them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def flip(tensor: Tensor, index: int, bit: int) -> Tensor:
    """Return a copy with one bit of one element flipped."""
    flipped = tensor.clone()
    words = flipped.view(-1).view(torch.uint8).view(flipped.numel(), -1)
    words[index, bit // 8] ^= 1 << bit % 8
    return flipped


def error_of(call: Callable[[], object]) -> str:
    """Return what the call's RuntimeError says."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing"


@contextmanager
def faulty_sums(spoil: Callable[[Tensor, Callable[[], Any]], Any]) -> Iterator[None]:
    """Let `dist.all_reduce`, as the hook calls it, go through spoil: the tensor and what adds it up."""
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return spoil(tensor, lambda: real(tensor, *args, **kwargs))

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = real


def noise(tensor: Tensor, add_up: Callable[[], Any], amount: float) -> Any:
    """Add noise to the sum of gradients on rank 1."""
    work = add_up()
    if dist.get_rank() == 1 and len(tensor) > 2:
        work.wait()
        length = torch.linalg.vector_norm(tensor.float())
        tensor.add_((amount * length / math.sqrt(len(tensor)) * torch.randn(len(tensor))).to(tensor.dtype))
    return work


def drop(tensor: Tensor, add_up: Callable[[], Any], shares_too: bool) -> Any:
    """Leave rank 1's gradients out of the sum."""
    if dist.get_rank() == 1 and (len(tensor) > 2 or shares_too):
        tensor.zero_()
    return add_up()


def change(tensor: Tensor, add_up: Callable[[], Any], how: str) -> Any:
    """Let rank 1 send something else than it voted with."""
    if dist.get_rank() == 1 and len(tensor) > 2:
        other = {"turned": -tensor, "doubled": 2 * tensor, "random": torch.randn_like(tensor) * tensor.std()}[how]
        tensor.copy_(other)
    return add_up()


FAULTS: dict[str, tuple[Any, ...]] = {
    "noise": (noise, 0.3),
    "drop": (drop, False),
    "drop with its share": (drop, True),
    **{how: (change, how) for how in ("turned", "doubled", "random")},
}
