"""Where this process stands among the others, and how a problem on one rank becomes an error on all.

Control messages travel over gloo, gradients over NCCL where every rank has a GPU of its own, so that ranks which
chose different devices can still tell each other.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.collectives import all_gather_text
from launch.errors import SettingsError

T = TypeVar("T")


class LaunchError(Exception):
    """What went wrong, raised on every rank at once; the cause is set on the ranks where it went wrong."""


@dataclass(frozen=True)
class Here:
    """Where this process runs. `group` carries gradients; None is the default (gloo) group."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def first(self) -> bool:
        """Return whether this rank writes the files and the screen."""
        return self.rank == 0


@contextmanager
def connected() -> Iterator[None]:
    """Join the group torchrun describes, and leave it when all is well.

    After an error this process ends at once, and torchrun ends the others. A clean exit would first wait for
    threads that may themselves be waiting, in the middle of a collective, for ranks that wait for this one.
    """
    dist.init_process_group("gloo")
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def take_place(device: str) -> Here:
    """Choose this rank's device, the same kind on every rank, and make the group that carries gradients."""
    rank, world, local_rank = dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    kind = together(lambda: _choose_device(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    kinds = gathered(kind)
    if len(set(kinds)) > 1:
        raise LaunchError(f"--device must come out the same on every rank, found {kinds}; choose cpu or cuda")
    if kind == "cpu":
        return Here(rank, world, local_rank, torch.device("cpu"), None)
    torch.cuda.set_device(local_rank)
    group = cast(dist.ProcessGroup, dist.new_group(backend="nccl"))
    return Here(rank, world, local_rank, torch.device("cuda", local_rank), group)


def _choose_device(choice: str, local_world: int) -> str:
    found = torch.cuda.device_count()
    if choice == "auto":
        return "cuda" if found >= local_world else "cpu"
    if choice == "cuda" and found < local_world:
        rule = "--device cuda needs one GPU per rank on each node"
        raise SettingsError(
            f"{rule}, found {found} for {local_world} ranks; start fewer ranks or use --device cpu"
        )
    return choice


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any, every rank raises `LaunchError` with what went wrong."""
    caught: Exception | None = None
    try:
        result = action()
    except Exception as error:
        caught = error
    problems = gathered(None if caught is None else _describe(caught))
    if any(problems):
        raise LaunchError(_joined(problems)) from caught
    return result


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"


def _joined(problems: list[str | None]) -> str:
    """Return one line if every rank says the same, else one per problem with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(rank)
    if len(ranks) == 1 and None not in problems:
        return next(iter(ranks))
    return "\n".join(f"on rank {', '.join(map(str, where))}: {problem}" for problem, where in ranks.items())


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


def gathered(value: T) -> list[T]:
    """Return every rank's value, in rank order. It travels as JSON: what another rank sends is never unpickled."""
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    return [json.loads(text) for text in all_gather_text(json.dumps(value), world, torch.device("cpu"))]


def from_first(value: T) -> T:
    """Return rank 0's value; what the others pass does not matter."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def summed(*values: float) -> Tensor:
    """Return the sums of numbers over all ranks, as float64."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total
