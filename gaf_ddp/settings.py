"""What GAFState may be told, and what every rank must have been told alike."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.rules.consensus import ConsensusAgreement
from gaf_ddp.rules.weighting import Weighting
from gaf_ddp.runtime.collectives import all_gather_text
from gaf_ddp.runtime.device import on_host


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: object, least: int) -> bool:
    return type(value) is int and value >= least


# Each setting's rule, in words and as a predicate.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "process_group": (
        "a torch.distributed.ProcessGroup that this rank is in, or None",
        lambda value: value is None or isinstance(value, dist.ProcessGroup),
    ),
    "weighting": ("callable or None", lambda value: value is None or callable(value)),
    "scope": ("'bucket', 'model' or None", lambda value: value is None or value in ("bucket", "model")),
    "exchange": (
        "'auto', 'sketch', 'sharded' or 'gather'",
        lambda value: value in ("auto", "sketch", "sharded", "gather"),
    ),
    "start_step": ("an integer >= 0", lambda value: _count(value, 0)),
    "wire_dtype": (
        "None, torch.float16, torch.bfloat16 or torch.float32",
        lambda value: value in (None, torch.float16, torch.bfloat16, torch.float32),
    ),
    "max_norm_ratio": ("None or a number >= 1", lambda value: value is None or (_number(value) and value >= 1)),
    "momentum": ("a number in [0, 1)", lambda value: _number(value) and 0 <= value < 1),
    "judge_every": ("None or an integer >= 1", lambda value: value is None or _count(value, 1)),
    "sketch_size": ("an integer >= 64", lambda value: _count(value, 64)),
    "voters": ("'rank' or 'host'", lambda value: value in ("rank", "host")),
    "watch": ("True or False", lambda value: isinstance(value, bool)),
    "check_every": ("None or an integer >= 1", lambda value: value is None or _count(value, 1)),
    "max_consecutive_skips": ("None or an integer >= 0", lambda value: value is None or _count(value, 0)),
}


LASTING = ("scope", "exchange", "wire_dtype", "sketch_size", "voters", "momentum", "judge_every", "check_every")
ASSIGNABLE = ("tau", "weighting", "start_step", "max_norm_ratio", "watch")


def require(holds: bool, rule: str, found: object) -> None:
    """Raise ValueError with the rule, which names the parameter, and what was found, unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, found {found!r}")


def require_valid(**settings: object) -> None:
    """Raise ValueError for the first setting that breaks its rule."""
    for name, value in settings.items():
        words, holds = RULES[name]
        require(holds(value), f"{name} must be {words}", value)


def resolve(ratio: float | None, scope: str | None, exchange: str, voters: str) -> tuple[str, str]:
    """Return scope and exchange where they were left open; raise ValueError for settings that exclude each other.

    The consensus rule (ratio is None for others) judges a step's whole gradient by sketches, one step late. Only it
    has voters of several ranks.
    """
    if ratio is None:
        require(voters == "rank", "voters='host' is for the consensus rule: tau and weighting must be None", voters)
        return scope or "bucket", exchange
    rule = "is for tau and weighting: the consensus rule judges the whole gradient by sketches, one step late"
    require(scope in (None, "model"), f"scope {rule}", scope)
    require(exchange in ("auto", "sketch"), f"exchange {rule}", exchange)
    return "model", "sketch"


def consensus_ratio(tau: object, weighting: object) -> float | None:
    """Return the consensus rule's ratio, None for other rules."""
    if tau is None and weighting is None:
        return ConsensusAgreement().ratio
    return weighting.ratio if type(weighting) is ConsensusAgreement else None


def describe(weighting: Callable[[Tensor], Tensor] | None) -> str:
    """Return a rule's constructor call; of other callables only the name can be compared."""
    if weighting is None:
        return "None"
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


def shared(state: Any) -> dict[str, object]:
    """Return what every rank must have alike: a `GAFState`'s settings, those that people set first."""
    names = ("start_step", "max_norm_ratio", "watch", "max_consecutive_skips", *LASTING)
    return {
        "tau": state._tau_now() if callable(state.tau) else state.tau,
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
            rule = "weighting must return the same on every rank: seed one that draws random numbers"
            if others:
                found = f"other weights in the last decision than rank 0's on ranks {', '.join(map(str, others))}"
                raise ValueError(f"{rule}, found {found}")
