"""Where this process stands among the others, and how a problem on one rank becomes an error on all.

Control messages travel over gloo, gradients over NCCL where every rank has a GPU of its own, so that ranks which
chose different devices can still tell each other.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from launch.errors import LaunchError, SettingsError
from launch.messages import gathered
from launch.starts import store_of_this_start, tell_torchrun

T = TypeVar("T")


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
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=store_of_this_start(store, rank, world), rank=rank, world_size=world)
    try:
        yield
    except BaseException:
        traceback.print_exc()
        tell_torchrun(traceback.format_exc())
        print(f"launch.train: error: rank {rank} failed, as above", file=sys.stderr, flush=True)
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
        raise SettingsError(f"{rule}, found {found} for {local_world} ranks; start fewer ranks or use --device cpu")
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
