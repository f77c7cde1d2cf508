"""What GAFState may be told, and what every rank must have been told alike."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from gc import get_objects
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp.collectives import all_gather_text
from gaf_ddp.weighting import Weighting

WIRE_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)


def require(holds: bool, rule: str, found: object) -> None:
    """Raise ValueError with the rule, which names the parameter, and what was found, unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, found {found!r}")


def require_number(rule: str, value: float, least: float, below: float = math.inf) -> float:
    """Return the value as a float, or raise ValueError unless it is a number in `[least, below)`, inf if open."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(is_number and value >= least and (value < below or below == math.inf), rule, value)
    return float(value)


def require_step(name: str, value: int) -> int:
    """Return the value, or raise ValueError unless it is an integer >= 0."""
    require(type(value) is int and value >= 0, f"{name} must be an integer >= 0", value)
    return value


def describe(weighting: Callable[[Tensor], Tensor]) -> str:
    """Return a rule's constructor call; of other callables only the name can be compared."""
    ours = isinstance(weighting, Weighting) and type(weighting).__module__.startswith("gaf_ddp.")
    return repr(weighting) if ours else getattr(weighting, "__qualname__", type(weighting).__name__)


@cache
def versions() -> dict[str, str]:
    """Return what else decides: the versions of torch and of Triton, which the kernels are compiled by."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "triton": triton}


@cache
def fingerprint(text: str) -> float:
    """Return a number for the text that a float64 holds exactly, from 0 to 2^48."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def as_text(settings: Mapping[str, object]) -> str:
    """Return the settings as text, the same for the same settings."""
    return json.dumps({name: str(value) for name, value in settings.items()})


def require_same(text: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare all ranks' settings, texts of `as_text`; a collective of the group, at host syncs.

    Raises:
        ValueError: on every rank, names the first setting that differs, and two ranks' values.
    """
    everyone = [json.loads(each) for each in all_gather_text(text, group, device)]
    for name, first in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other.get(name) != first:
                found = f"{first} on rank 0 and {other.get(name)} on rank {rank}"
                raise ValueError(f"{name} must be the same on every rank, found {found}")


def require_group(group: dist.ProcessGroup, parameters: Iterable[Tensor]) -> None:
    """Raise ValueError if the DDP model that holds these parameters averages over another group.

    A hook is not told its model, and torch has no way to ask. So this looks for the model among all objects, some
    20 ms once; one that is not found, as after `gc.freeze()`, is not compared.
    """
    wanted = {id(parameter) for parameter in parameters}
    for model in [each for each in get_objects() if issubclass(type(each), DistributedDataParallel)]:
        theirs = getattr(model, "process_group", group)
        if theirs.group_name != group.group_name and wanted <= {id(parameter) for parameter in model.parameters()}:
            ranks, their_ranks = dist.get_process_group_ranks(group), dist.get_process_group_ranks(theirs)
            raise ValueError(
                f"process_group must be the model's own, found {group.group_name!r} of ranks {ranks} beside "
                f"the model's {theirs.group_name!r} of ranks {their_ranks}"
            )
