"""What every rank must have been told alike, and how a difference is found before it does harm."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.rules.weighting import Weighting
from gaf_ddp.runtime.collectives import all_gather_text
from gaf_ddp.runtime.device import on_host
from gaf_ddp.settings import LASTING


def shared(state: Any) -> dict[str, object]:
    """Return what every rank must have alike: a `GAFState`'s settings, those that people set first."""
    names = ("start_step", "max_norm_ratio", "watch", "max_consecutive_skips", *LASTING)
    return {
        "tau": state._tau_at(state.step) if callable(state.tau) else state.tau,
        "weighting": describe(state.weighting),
        **{name: getattr(state, name) for name in names},
        "skip_on_disagreement": len(state._records.followers),
        **versions(),
    }


@cache
def fingerprint(text: str) -> float:
    """Return a number for the text that a float64 holds exactly, from 0 to 2^48."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def as_text(settings: Mapping[str, object]) -> str:
    """Return the settings as text, the same for the same settings."""
    return json.dumps({name: str(value) for name, value in settings.items()})


def require_same(text: str, group: dist.ProcessGroup, device: torch.device) -> list[dict[str, str]]:
    """Compare all ranks' settings, texts of `as_text`; a collective of the group, at host syncs.

    Returns:
        Every rank's settings; their "host" may differ.

    Raises:
        ValueError: on every rank, names the first setting that differs, and two ranks' values.
    """
    everyone: list[dict[str, str]] = [json.loads(each) for each in all_gather_text(text, group, device)]
    for name, first in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other.get(name) != first and name != "host":
                found = f"{first} on rank 0 and {other.get(name)} on rank {rank}"
                raise ValueError(f"{name} must be the same on every rank, found {found}")
    return everyone


def fingerprints(settings: Mapping[str, object]) -> list[float]:
    """Return a number for each setting, the same for the same value."""
    return [fingerprint(str(value)) for value in settings.values()]


def require_alike(settings: Mapping[str, object], everyone: Tensor, rank: int) -> None:
    """Raise ValueError if the ranks' `fingerprints` `(W, settings)`, on the host, differ; names the first setting."""
    differs = (everyone != everyone[:1]).any(0)
    if bool(differs.any()):
        index = int(differs.nonzero()[0])
        name, value = list(settings.items())[index]
        others = [other for other, row in enumerate(everyone.tolist()) if row[index] != everyone[0, index]]
        found = f"{value} on this rank, {rank}; ranks {', '.join(map(str, others))} have another than rank 0"
        raise ValueError(f"{name} must be the same on every rank, found {found}")


def require_one_replica(unlike: Tensor) -> None:
    """Raise ValueError where ranks of one replica were told unlike things: `(W,)`, on the host, is not 0."""
    replicas = unlike.nonzero().flatten().tolist()
    if replicas:
        rule = "settings, and who counts, must be the same on all ranks of a replica"
        raise ValueError(f"{rule}, found others within the replicas of ranks {', '.join(map(str, replicas))}")


def require_one(numbers: Tensor) -> None:
    """Raise ValueError if the ranks' numbers `(W,)`, on the host, differ: they decided by unlike settings."""
    others = [rank for rank, number in enumerate(numbers.tolist()) if number != numbers[0]]
    if others:
        rule = "settings and weights must be the same on every rank"
        raise ValueError(f"{rule}, found others than rank 0's on ranks {', '.join(map(str, others))}")


class Fingerprints:
    """Compare what ranks decide by with every decision: two numbers of each rank beside what the ranks add up.

    They are of the settings, and of the last decision's weights: a weighting must return the same on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._rows = torch.zeros(2, group.size(), dtype=torch.float64, device=device)
        self._settings: str | None = None

    def own(self, settings: str) -> Tensor:
        """Return `(2, W)`, this rank's numbers in its own column: the sum over the ranks holds everyone's."""
        if self._settings != settings:
            self._settings = settings
            self._rows[0, self._group.rank()] = fingerprint(settings)
        return self._rows

    def remember(self, weights: Tensor) -> None:
        """Let the next decision compare these weights `(W,)` too; never waits for the device."""
        odd = torch.arange(1, 2 * len(weights), 2, dtype=torch.float64, device=weights.device)
        self._rows[1, self._group.rank()] = (weights.double().nan_to_num(-1.0) * odd.sqrt()).sum()

    def require_same(self, settings: str, numbers: Tensor) -> None:
        """Raise ValueError if everyone's numbers `(2, W)` differ; on accelerators `Records.read` tells later."""
        if on_host(numbers):
            told, weighed = numbers.tolist()
            if len(set(told)) > 1:
                require_same(settings, self._group, numbers.device)
            others = [rank for rank, number in enumerate(weighed) if number != weighed[0]]
            if others:
                rule = "weighting must return the same on every rank: seed one that draws random numbers"
                raise ValueError(f"{rule}, found others than rank 0's in the last decision on {others}")


def describe(weighting: Callable[[Tensor], Tensor] | None) -> str:
    """Return what a rule says of itself, if it has a `repr` of its own; else its name alone can be compared."""
    if weighting is None:
        return "None"
    says = isinstance(weighting, Weighting) and type(weighting).__repr__ is not object.__repr__
    return repr(weighting) if says else getattr(weighting, "__qualname__", type(weighting).__name__)


@cache
def versions() -> dict[str, str]:
    """Return what else decides: the versions of torch and of Triton, which the kernels are compiled by."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "triton": triton}
