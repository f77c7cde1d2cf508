"""What GAFState may be told, and what every rank must have been told alike."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.rules.consensus import ConsensusAgreement
from gaf_ddp.rules.memory import MOMENTUM
from gaf_ddp.rules.neighborhood import NeighborhoodAgreement
from gaf_ddp.rules.weighting import Mean, require_tau


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
    "replica_group": (
        "a torch.distributed.ProcessGroup that this rank is in, or None",
        lambda value: value is None or isinstance(value, dist.ProcessGroup),
    ),
    "weighting": (
        "callable, and no class, or None",
        lambda value: value is None or (callable(value) and not isinstance(value, type)),
    ),
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


def require_assignable(held: Mapping[str, Any], name: str, value: object) -> None:
    """Raise AttributeError if a state that holds these attributes takes none of this name now.

    ValueError if it would, but breaks its rule.
    """
    if name in RULES and name not in ASSIGNABLE and held.get("_is_connected", False):
        raise AttributeError(f"{name} holds from the first bucket on: make a new GAFState for a new model")
    if name in RULES:
        require_valid(**{name: value})
    elif "step" in held and name not in held and not name.startswith("_"):
        raise AttributeError(f"GAFState has no setting {name!r}, found one assigned")
    if name in ("tau", "weighting") and "step" in held and held["_ratio"] is not None and value is not None:
        raise AttributeError(f"{name} cannot be assigned where the consensus rule judges: make a new GAFState")


def resolve(ratio: float | None, scope: str | None, exchange: str, voters: str, momentum: float) -> tuple[str, str]:
    """Return scope and exchange where they were left open; raise ValueError for settings that exclude each other.

    The consensus rule (ratio is None for others) judges a step's whole gradient by sketches, one step late. Only it
    has voters of several ranks, and a memory.
    """
    if ratio is None:
        rule = "is for the consensus rule: tau and weighting must be None"
        require(voters == "rank", f"voters='host' {rule}", voters)
        require(momentum == MOMENTUM, f"momentum {rule}", momentum)
        return scope or "bucket", exchange
    rule = "is for tau and weighting: the consensus rule judges the whole gradient by sketches, one step late"
    require(scope in (None, "model"), f"scope {rule}", scope)
    require(exchange in ("auto", "sketch"), f"exchange {rule}", exchange)
    return "model", "sketch"


def require_for_replicas(group: dist.ProcessGroup | None, ratio: float | None, voters: str) -> None:
    """Raise ValueError for settings that exclude replicas of several ranks."""
    if group is not None:
        require(ratio is not None, "replica_group is for the consensus rule: tau and weighting must be None", group)
        require(voters == "rank", "voters must be 'rank' beside replica_group: a replica is the voter", voters)


def consensus_ratio(tau: object, weighting: object) -> float | None:
    """Return the consensus rule's ratio, None for other rules."""
    if tau is None and weighting is None:
        return ConsensusAgreement().ratio
    return weighting.ratio if type(weighting) is ConsensusAgreement else None


class Settings:
    """The settings of a `GAFState`, which says what they mean; they are checked, and say so when they are assigned."""

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        tau: float | Callable[[int], float] | None = None,
        *,
        weighting: Callable[[Tensor], Tensor] | None = None,
        scope: Literal["bucket", "model"] | None = None,
        exchange: Literal["auto", "sketch", "sharded", "gather"] = "auto",
        start_step: int = 0,
        wire_dtype: torch.dtype | None = None,
        max_norm_ratio: float | None = 10.0,
        momentum: float = MOMENTUM,
        judge_every: int | None = None,
        sketch_size: int = 4096,
        watch: bool = False,
        voters: Literal["rank", "host"] = "rank",
        check_every: int | None = None,
        max_consecutive_skips: int | None = None,
        replica_group: dist.ProcessGroup | None = None,
    ) -> None:
        require_valid(**{name: value for name, value in locals().items() if name in RULES})
        require(weighting is None or tau is None, "tau and weighting exclude each other: tau must be None", tau)
        self._is_connected = False  # since a model's first bucket
        self._ratio = consensus_ratio(tau, weighting)
        self.process_group, self.replica_group = process_group, replica_group
        self.tau = tau if tau is None or callable(tau) else require_tau(tau)
        self.weighting = weighting
        self.scope, self.exchange = resolve(self._ratio, scope, exchange, voters, momentum)
        require_for_replicas(replica_group, self._ratio, voters)
        self.start_step, self.wire_dtype = start_step, wire_dtype
        self.max_norm_ratio = None if max_norm_ratio is None else float(max_norm_ratio)
        self.momentum = float(momentum)
        self.judge_every, self.sketch_size = judge_every, sketch_size
        self.watch, self.voters = watch, voters
        self.check_every, self.max_consecutive_skips = check_every, max_consecutive_skips
        self._start()

    def _start(self) -> None:
        """Begin with what there is beside the settings."""

    def __setattr__(self, name: str, value: object) -> None:
        """Assign a setting; AttributeError for those that hold from the first bucket on."""
        require_assignable(self.__dict__, name, value)
        super().__setattr__(name, value)

    def _weighting_at(self, step: int) -> Callable[[Tensor], Tensor]:
        """Return the rule of a step, where that is not the consensus."""
        if step < self.start_step:
            return Mean()
        return self.weighting or NeighborhoodAgreement(self._tau_at(step))

    def _tau_at(self, step: int) -> float:
        assert self.tau is not None
        return require_tau(self.tau(step)) if callable(self.tau) else self.tau

    @property
    def _is_consensus(self) -> bool:
        return self._ratio is not None

    @property
    def _is_late(self) -> bool:
        return self._is_consensus or self.watch


Settings.__init__.__qualname__ = "GAFState.__init__"  # what an error says of a setting that there is not
