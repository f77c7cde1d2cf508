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

from gaf_ddp.collectives import all_gather_text
from gaf_ddp.consensus import ConsensusAgreement
from gaf_ddp.device import on_host
from gaf_ddp.weighting import Weighting


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
    "scope": (
        "'bucket', 'model', 'running' or None",
        lambda value: value is None or value in ("bucket", "model", "running"),
    ),
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
    "vote_momentum": ("a number in [0, 1)", lambda value: _number(value) and 0 <= value < 1),
    "sketch_size": ("an integer >= 64", lambda value: _count(value, 64)),
    "voters": ("'rank' or 'host'", lambda value: value in ("rank", "host")),
    "watch": ("True or False", lambda value: isinstance(value, bool)),
    "check_every": ("None or an integer >= 1", lambda value: value is None or _count(value, 1)),
    "max_consecutive_skips": ("None or an integer >= 0", lambda value: value is None or _count(value, 0)),
}


def require(holds: bool, rule: str, found: object) -> None:
    """Raise ValueError with the rule, which names the parameter, and what was found, unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, found {found!r}")


def require_valid(**settings: object) -> None:
    """Raise ValueError for the first setting that breaks its rule."""
    for name, value in settings.items():
        words, holds = RULES[name]
        require(holds(value), f"{name} must be {words}", value)


def resolve(
    ratio: float | None, scope: str | None, exchange: str, vote_momentum: float, watch: bool, voters: str
) -> tuple[str, str]:
    """Return scope and exchange where they were left open; raise ValueError for settings that exclude each other.

    The consensus rule has a memory, and momenta of its own; only sketches leave the averages to an all-reduce, and
    are small enough to be added up. Its ratio is None for other rules.
    """
    is_consensus = ratio is not None
    scope = scope or ("running" if is_consensus else "bucket")
    rule = "scope 'running' is for the consensus rule, with others scope must be 'bucket' or 'model'"
    require(scope != "running" or is_consensus, rule, scope)
    rule = "vote_momentum must be 0 with the consensus rule and with voters='host'"
    require(not vote_momentum or not (is_consensus or voters == "host"), rule, vote_momentum)
    sketched = watch or voters == "host"
    exchange = "sketch" if exchange == "auto" and (is_consensus or sketched) else exchange
    rule = "watch is for exchange 'sketch'" if watch else "voters='host' is for exchange 'sketch'"
    require(not sketched or exchange == "sketch", rule, exchange)
    return scope, exchange


def consensus_ratio(tau: object, weighting: object) -> float | None:
    """Return the consensus rule's ratio, None for other rules."""
    if tau is None and weighting is None:
        return ConsensusAgreement().ratio
    return weighting.ratio if type(weighting) is ConsensusAgreement else None


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


class Fingerprints:
    """Compare the ranks' settings with every decision: a number for each rank's, beside what the ranks add up."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._own: tuple[str, Tensor] | None = None

    def own(self, settings: str) -> Tensor:
        """Return `(1, W)`, this rank's number in its own column: the sum over the ranks holds everyone's."""
        if self._own is None or self._own[0] != settings:
            row = torch.zeros(1, self._group.size(), dtype=torch.float64, device=self._device)
            row[:, self._group.rank()] = fingerprint(settings)
            self._own = settings, row
        return self._own[1]

    def require_same(self, settings: str, numbers: Tensor) -> None:
        """Raise ValueError if everyone's numbers `(W,)` differ; on accelerators `AgreementMeter` tells later."""
        if on_host(numbers) and len(set(numbers.tolist())) > 1:
            require_same(settings, self._group, self._device)
