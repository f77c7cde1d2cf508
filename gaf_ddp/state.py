"""GAFState: the settings of the hook, where it is in training, and what it saw."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.agreement import Agreement, AgreementMeter
from gaf_ddp.compatibility import require_same
from gaf_ddp.exchange import Exchange, Exchanges
from gaf_ddp.gramian import Rows
from gaf_ddp.momenta import Momenta
from gaf_ddp.overlap import Lane, Promise, open_lane
from gaf_ddp.weighting import Mean, NeighborhoodAgreement, is_tau_rule, require_tau

_logger = logging.getLogger(__name__)


@dataclass
class Share:
    """One bucket between its arrival and its decision; of a GradBucket, only what outlives the hook's call."""

    buffer: Tensor  # (N,), DDP's own memory, where the result goes
    parameters: list[Tensor]
    is_first: bool  # of its step
    is_last: bool
    promise: Promise
    exchange: Exchange
    arrive: Callable[[], Rows]  # waits for the rows (W, n)

    @property
    def key(self) -> tuple[int, ...]:
        """What the bucket is about: DDP may lay its buckets out anew, so an index would not do."""
        return tuple(map(id, self.parameters))


@dataclass(frozen=True)
class Decision:
    """One decision and the parameters it was about."""

    agreement: Agreement
    parameters: list[Tensor]


class GAFState:
    """Settings, step counter and statistics of `gaf_hook`.

    Often tuned:
        tau: largest cosine distance at which two gradients agree, in [0, 2], or a schedule from `state.step` to
            it. None is 1.0; 2.0 keeps every voter. `GAFState(tau=t)` filters with `NeighborhoodAgreement(t)`.
        scope: `"bucket"`, one decision per DDP bucket; `"model"`, one per step from the Gramian of the whole
            gradient (the paper's meaning), at the price of holding all slices until the last bucket.
        vote_momentum: judge each rank by `m ← vote_momentum · m + g`, its recent gradients, in place of the last
            alone; in [0, 1). What is averaged are the gradients still.
        start_step: plain averaging before this step.

    Seldom tuned:
        process_group: the group DDP was built with; None is the default group at the first bucket.
        weighting: any callable from Gramian `(W, W)` to weights `(W,)` in place of tau. It must return the same
            on every rank: seed one that draws random numbers.
        exchange: `"sharded"` (all-reduce's bytes), `"gather"` (the plain reading), `"auto"` (sharded; on
            accelerators in bucket scope, gather for buckets too small for bandwidth to matter).
        wire_dtype: dtype the gradients travel in, e.g. `torch.bfloat16`; products and sums stay in float32. What
            float16 cannot hold, beyond 65504 or below 6e-8, becomes inf or 0.
        max_norm_ratio: a rank whose gradient is longer than this many lower median norms has no vote; None
            switches the guard off.

    Attributes:
        step: synchronised backwards seen so far.
        agreement: the last step's `Agreement`, on the device; None before the first step.
        decisions: the last step's decisions with their parameters, one in model scope, one per bucket otherwise.

    Memory: bucket scope about one bucket beside DDP's own on accelerators, on the CPU as many as wait for the
    thread, up to one gradient; model scope about one gradient; vote_momentum one float32 gradient more, W with the
    gather exchange; wire_dtype on the CPU up to one gradient in that dtype. A pickled state leaves process group
    and momenta behind.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        tau: float | Callable[[int], float] | None = None,
        *,
        weighting: Callable[[Tensor], Tensor] | None = None,
        scope: Literal["bucket", "model"] = "bucket",
        exchange: Literal["auto", "sharded", "gather"] = "auto",
        start_step: int = 0,
        wire_dtype: torch.dtype | None = None,
        max_norm_ratio: float | None = 10.0,
        vote_momentum: float = 0.0,
    ) -> None:
        _require(
            process_group is None or isinstance(process_group, dist.ProcessGroup),
            "process_group must be a torch.distributed.ProcessGroup that this rank is in, or None",
            process_group,
        )
        _require(weighting is None or tau is None, "tau and weighting exclude each other: tau must be None", tau)
        _require(weighting is None or callable(weighting), "weighting must be callable or None", weighting)
        _require(scope in ("bucket", "model"), "scope must be 'bucket' or 'model'", scope)
        _require(
            exchange in ("auto", "sharded", "gather"),
            "exchange must be 'auto', 'sharded' or 'gather'",
            exchange,
        )
        _require(_is_number(start_step, int) and start_step >= 0, "start_step must be an integer >= 0", start_step)
        _require(
            wire_dtype in (None, torch.float16, torch.bfloat16, torch.float32),
            "wire_dtype must be None, torch.float16, torch.bfloat16 or torch.float32",
            wire_dtype,
        )
        _require(
            max_norm_ratio is None or (_is_number(max_norm_ratio, (int, float)) and max_norm_ratio >= 1),
            "max_norm_ratio must be None or a number >= 1",
            max_norm_ratio,
        )
        _require(
            _is_number(vote_momentum, (int, float)) and 0 <= vote_momentum < 1,
            "vote_momentum must be a number in [0, 1)",
            vote_momentum,
        )
        self.process_group = process_group
        self.tau = tau if callable(tau) else require_tau(1.0 if tau is None else tau)
        self.weighting = weighting
        self.scope = scope
        self.exchange = exchange
        self.start_step = start_step
        self.wire_dtype = wire_dtype
        self.max_norm_ratio = max_norm_ratio
        self.vote_momentum = vote_momentum
        self.momenta = Momenta(vote_momentum) if vote_momentum else None

        self.step = 0
        self.decisions: list[Decision] = []
        self.meter = AgreementMeter()

        self._parent: dist.ProcessGroup | None = None
        self._connection: tuple[torch.device, Lane, Exchanges] | None = None
        self._waiting: list[tuple[Share, Rows, Tensor]] = []
        self._decided: list[Decision] = []
        self._sent: list[tuple[Share, Callable[[], None]]] = []

    @property
    def agreement(self) -> Agreement | None:
        """The last step's record; in bucket scope each field has a leading dimension, one entry per bucket."""
        if not self.decisions:
            return None
        if self.scope == "model":
            return self.decisions[0].agreement
        return Agreement.stack([decision.agreement for decision in self.decisions])

    def summary(self, reset: bool = True) -> dict[str, float]:
        """Return the statistics since the last reset, at one host sync; see `AgreementMeter.summary`.

        Logs a warning when more than half of the decisions found no agreement: tau is too strict, or gradients are
        not finite. All ranks know the same, so only the group's first one says it.
        """
        summary = self.meter.summary()
        speaks = self._parent is None or self._parent.rank() == 0
        if speaks and summary.get("gaf/skipped_fraction", 0.0) > 0.5:
            _logger.warning(
                "gaf_ddp: nothing agreed in %.0f %% of the decisions; %s",
                100 * summary["gaf/skipped_fraction"],
                "gradients are not finite: is wire_dtype float16, or the learning rate or loss scale too large?"
                if summary["gaf/nonfinite_fraction"] > 0.5
                else "raise tau or the batch size per rank",
            )
        if reset:
            self.meter.reset()
        return summary

    def state_dict(self) -> dict[str, Any]:
        """Return what training needs to go on: the step and the statistics; momenta begin anew."""
        return {"step": self.step, "meter": self.meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`; the world size may differ, statistics per rank then start anew."""
        _require({"step", "meter"} <= state_dict.keys(), "state_dict must hold step and meter", sorted(state_dict))
        self.step = state_dict["step"]
        self.meter.load_state_dict(state_dict["meter"])

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the process group and what hangs on it."""
        if self.process_group is not None:
            _logger.warning("gaf_ddp: process_group is not pickled; the copy will use the default group")
        left_behind: dict[str, Any] = {
            "process_group": None,
            "momenta": self.momenta and self.momenta.anew(),
            "_parent": None,
            "_connection": None,
            "_waiting": [],
            "_decided": [],
            "_sent": [],
        }
        return {**self.__dict__, **left_behind, "decisions": []}

    # What follows is for gaf_hook.

    def connect(self, buffer: Tensor) -> tuple[Lane, Exchange]:
        """Return where a bucket is worked on and how it travels; made at the first bucket, anew for a new group.

        The choice follows from the settings, W and the bucket's bytes alone: the same on every rank.

        Raises:
            ValueError: there is no group, the ranks' settings differ, or the buckets' devices do.
        """
        parent = self.process_group or dist.group.WORLD
        if parent is None:
            raise ValueError("process_group is None and there is no default group: call init_process_group first")
        if parent is not self._parent:
            self._parent, self._connection = parent, None
        if self._connection is None:
            lane = open_lane(parent, buffer.device)
            require_same(self._shared_settings(), lane.group)
            exchanges = Exchanges(lane.group, self.wire_dtype, lane.small_messages)
            self._connection = buffer.device, lane, exchanges
        device, lane, exchanges = self._connection
        if buffer.device != device:
            rule = "all parameters of a rank's model must be on one device"
            raise ValueError(f"{rule}, found {device} and {buffer.device}")
        name = "sharded" if self.exchange == "auto" and self.scope == "model" else self.exchange
        return lane, exchanges.choose(name, buffer)

    def _shared_settings(self) -> dict[str, str]:
        """Return what must be the same on every rank; of callables only their names can be compared."""
        names = ("scope", "exchange", "wire_dtype", "start_step", "max_norm_ratio", "vote_momentum", "step")
        tau = "a schedule" if callable(self.tau) else repr(self.tau)
        rule = self.weighting
        weighting = (
            repr(rule) if rule and is_tau_rule(rule) else getattr(rule, "__qualname__", type(rule).__name__)
        )
        return {"tau": tau, "weighting": weighting} | {name: repr(getattr(self, name)) for name in names}

    def weighting_now(self) -> Callable[[Tensor], Tensor]:
        """Return the weighting of the current step."""
        if self.step < self.start_step:
            return Mean()
        if self.weighting is not None:
            return self.weighting
        return NeighborhoodAgreement(self.tau(self.step) if callable(self.tau) else self.tau)

    def wait(self, share: Share, rows: Rows, gramian: Tensor) -> list[tuple[Share, Rows, Tensor]]:
        """Add a bucket to those without a decision; return them all if it is time for one, else none."""
        if share.is_first:  # a backward that broke off may have left some behind
            self._waiting, self._decided = [], []
        self._waiting.append((share, rows, gramian))
        if self.scope == "model" and not share.is_last:
            return []
        ready, self._waiting = self._waiting, []
        return ready

    def send(self, share: Share, arrive: Callable[[], None]) -> None:
        """Note that a bucket's average is on its way."""
        self._sent.append((share, arrive))

    def sent(self) -> list[tuple[Share, Callable[[], None]]]:
        """Return the buckets on their way, each with the function that waits for it, and forget them."""
        sent, self._sent = self._sent, []
        return sent

    def record(self, agreement: Agreement, shares: list[Share]) -> None:
        """Keep a decision; the last bucket's ends the step."""
        self._decided.append(Decision(agreement, [p for share in shares for p in share.parameters]))
        if self.momenta is not None:
            for share in shares:
                self.momenta.forget(share.key, agreement.nonfinite | agreement.overlong)
        if shares[-1].is_last:
            if self.momenta is not None:
                self.momenta.finish()
            self.decisions, self._decided = self._decided, []
            self.meter.record(*(decision.agreement for decision in self.decisions))
            self.step += 1


def _is_number(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and not math.isnan(value)  # type: ignore[arg-type]


def _require(holds: bool, rule: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, found {found!r}")
