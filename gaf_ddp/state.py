"""GAFState: the settings of the hook, where it is in training, and what it saw."""

import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import settings
from gaf_ddp.agreement import Agreement
from gaf_ddp.consensus import ConsensusAgreement
from gaf_ddp.consensus_judge import ByConsensus
from gaf_ddp.hosts import ByHosts
from gaf_ddp.judges import ByGradients, ByMomenta, Judge
from gaf_ddp.pipeline import Decision, Way
from gaf_ddp.replicas import ReplicaCheck
from gaf_ddp.reports import Report
from gaf_ddp.saved import VERSION, require_saved
from gaf_ddp.settings import require
from gaf_ddp.statistics import Statistics
from gaf_ddp.weighting import Mean, NeighborhoodAgreement, require_tau

_logger = logging.getLogger(__name__)
_NOTHING = b"-"  # no memory; `torch.load` refuses b"" where it unpickles no code


class GAFState:
    """Settings, step counter and statistics of `gaf_hook`. `GAFState()` needs none of the settings.

    Which ranks count:
        `GAFState()`: the consensus rule with its memory (`ConsensusAgreement`), over sketches. Nothing to tune.
        tau: largest cosine distance at which two gradients agree, in [0, 2], or a schedule from `state.step` to
            it: `GAFState(tau=t)` filters with `NeighborhoodAgreement(t)`, exactly; 2.0 keeps every voter.
        weighting: any callable from Gramian `(W, W)` to weights `(W,)`, the same on every rank: seed one that
            draws random numbers. `ConsensusAgreement(ratio)` has its memory here too.
        watch: judge and record, but average everyone; nothing waits for the verdict.

    Seldom tuned:
        process_group: the group DDP was built with; None is the default group at the first bucket.
        scope: `"bucket"`, one decision per DDP bucket; `"model"`, one per step from the Gramian of the whole
            gradient (the paper's meaning), which is averaged after it; `"running"`, for the consensus rule: each
            bucket as it arrives, by the whole gradient as known then. None is running for that rule, else bucket.
        exchange: `"sketch"` (cosines to 1/√sketch_size, the library's all-reduce), `"sharded"` (exact, a ring
            all-reduce's bytes per rank), `"gather"` (exact, the plain reading). `"auto"`: sketch for the consensus
            rule and to watch; else sharded, on accelerators in bucket scope gather for the smallest buckets.
        sketch_size: k, numbers that a bucket is judged by there, at least 64.
        voters: `"rank"`, or `"host"`: one vote and one weight for all ranks of a host, over sketches.
        vote_momentum: judge ranks by `m ← vote_momentum · m + g`, not by the last gradient alone; in [0, 1), for
            tau and weightings. What is averaged are the gradients still.
        start_step: plain averaging before this step.
        wire_dtype: dtype the gradients travel in, e.g. `torch.bfloat16`; products stay in float32, sums too but
            for sketch's. What float16 cannot hold, beyond 65504 or below 6e-8, becomes inf or 0.
        max_norm_ratio: a rank whose gradient is longer than this many lower median norms has no vote; None is no
            guard.
        check_every: compare the bits of all ranks' parameters every so many steps, as `check_replicas` does, which
            says more; on accelerators what was found is raised at the next check or `summary()`.
        max_consecutive_skips: end with RuntimeError, on every rank, once nothing agreed in more steps in a row; on
            accelerators at the next `summary()`, `report()`, or skip that waits for the device.

    tau, weighting, start_step and max_norm_ratio may be assigned while training, on every rank alike; the others
    hold from the first bucket on. What decides is compared with every decision: a difference between ranks is
    raised on all, on the CPU at once, on accelerators by the next `summary()` or skip that waits for the device.

    Attributes:
        step: synchronised backwards seen so far.
        agreement: the last step's `Agreement`, on the device; None before the first step.
        decisions: the last step's decisions with their parameters, one in model scope, else one per bucket.

    On an accelerator read them, and `summary()`, on training's own stream, which alone waits for the hook's work.

    Memory: sketch `W · sketch_size` numbers a bucket. Exact exchanges: bucket scope about one bucket beside DDP's
    own on accelerators, on the CPU as many as wait for the thread; model scope about one gradient; momenta one
    float32 gradient more, W with gather; wire_dtype on the CPU up to one gradient in that dtype. A pickled state
    leaves process group and momenta behind.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        tau: float | Callable[[int], float] | None = None,
        *,
        weighting: Callable[[Tensor], Tensor] | None = None,
        scope: Literal["bucket", "model", "running"] | None = None,
        exchange: Literal["auto", "sketch", "sharded", "gather"] = "auto",
        start_step: int = 0,
        wire_dtype: torch.dtype | None = None,
        max_norm_ratio: float | None = 10.0,
        vote_momentum: float = 0.0,
        sketch_size: int = 4096,
        watch: bool = False,
        voters: Literal["rank", "host"] = "rank",
        check_every: int | None = None,
        max_consecutive_skips: int | None = None,
    ) -> None:
        settings.require_valid(**{name: value for name, value in locals().items() if name in settings.RULES})
        require(weighting is None or tau is None, "tau and weighting exclude each other: tau must be None", tau)
        self.process_group = process_group
        self.tau = tau if tau is None or callable(tau) else require_tau(tau)
        self.weighting = weighting
        self._ratio = settings.consensus_ratio(tau, weighting)
        self.scope, self.exchange = settings.resolve(self._ratio, scope, exchange, vote_momentum, watch, voters)
        self.start_step = start_step
        self.wire_dtype = wire_dtype
        self.max_norm_ratio = None if max_norm_ratio is None else float(max_norm_ratio)
        self.vote_momentum = float(vote_momentum)
        self.sketch_size = sketch_size
        self.watch = watch
        self.voters = voters
        self.check_every = check_every
        self.max_consecutive_skips = max_consecutive_skips

        self.step = 0
        self.decisions: list[Decision] = []
        self._statistics = Statistics()
        self._replicas = ReplicaCheck(check_every)
        self._judge = self._new_judge()
        self._skips = 0  # optimizers whose steps are left out by what this state decides
        self._awaits_hook = False  # attached, and no step since
        self._pipeline: Way | None = None

    @property
    def agreement(self) -> Agreement | None:
        """The last step's record; in bucket scope each field has a leading dimension, one entry per bucket."""
        if not self.decisions:
            return None
        if self.scope == "model":
            return self.decisions[0].agreement
        return Agreement.stack([decision.agreement for decision in self.decisions])

    def summary(self, reset: bool = True) -> dict[str, float]:
        """Return the statistics since the last reset, see `AgreementMeter.summary`; waits for the device.

        `gaf/out_rank_00` … beside them: for how many steps in a row that rank has been left out, up to now.

        Logs warnings, the group's first rank for all: when more than half of the decisions found no agreement; of
        ranks that were out for 200 steps in a row, once in 1000 steps, on the CPU without being asked too.

        Raises:
            ValueError: ranks decided by unlike settings, or a weighting returned what is no weight.
            RuntimeError: nothing agreed in more than `max_consecutive_skips` steps in a row, or replicas differ.
        """
        if self._awaits_hook:
            warnings.warn("gaf_ddp: attached, but no gradient came: is the wrapped model called?", stacklevel=2)
            self._awaits_hook = False
        self._replicas.finish()
        return self._statistics.summary(self.step, self.max_consecutive_skips, reset)

    def report(self) -> Report:
        """Return where each rank stands since training began: `str` for people, `as_dict()` for programs.

        No `summary()` resets it, `state_dict()` saves it, another world size begins it anew. Kept on the device
        until asked for; then waits for it, warns of ranks and raises RuntimeError as `summary()` does.
        """
        return self._statistics.report(self.step, self.max_consecutive_skips)

    def state_dict(self) -> dict[str, Any]:
        """Return what training needs to go on, at host syncs: step, statistics, the consensus rule's memory.

        Plain numbers in lists, and bytes without code, the same keys always: it loads through
        torch.distributed.checkpoint into a fresh state, and at another world size. Momenta are in the memory where
        every rank has them whole: of gathered sketches. Others begin anew, as those of `vote_momentum` do.
        """
        columns = self.sketch_size if self.exchange == "sketch" else 0
        memory = self._judge.dump(columns) if isinstance(self._judge, ByConsensus) else _NOTHING
        return {"version": VERSION, "step": self.step, "memory": memory, **self._statistics.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`; the world size may differ, what is known of ranks then starts anew.

        Raises:
            ValueError: state_dict is not what `state_dict()` returns; nothing is changed then.
        """
        require_saved(state_dict)
        judge, memory = self._new_judge(), state_dict["memory"]
        if isinstance(judge, ByConsensus) and memory != _NOTHING:
            judge.load(memory)
        self._statistics.load_state_dict(state_dict)
        self.step, self._judge = state_dict["step"], judge
        if self._pipeline is not None and isinstance(self._pipeline.judge, ByHosts):
            self._pipeline.judge.judge = judge
        elif self._pipeline is not None:
            self._pipeline.judge = judge

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the process group and what hangs on it."""
        if self.process_group is not None:
            _logger.warning("gaf_ddp: a GAFState is pickled without its process_group; set it after unpickling")
        left_behind: dict[str, Any] = {"process_group": None, "_pipeline": None, "_skips": 0, "decisions": []}
        return {**self.__dict__, **left_behind, "_judge": self._new_judge(), "_awaits_hook": False}

    def _new_judge(self) -> Judge:
        if self._ratio is not None:
            return ByConsensus(self._ratio, self.scope)
        return ByMomenta(self.vote_momentum) if self.vote_momentum else ByGradients()

    # What follows is for gaf_hook, connect, attach and skip_on_disagreement.

    def _weighting_now(self) -> Callable[[Tensor], Tensor]:
        if self.step < self.start_step:
            return Mean()
        if self.weighting is not None:
            return self.weighting
        if self.tau is None:
            return ConsensusAgreement()
        return NeighborhoodAgreement(self.tau(self.step) if callable(self.tau) else self.tau)

    def _end_step(self, decided: list[tuple[Decision, Tensor]]) -> None:
        """Keep what a step decided, with the numbers of the settings that each rank decided by."""
        self.decisions = [decision for decision, _ in decided]
        self.step += 1
        self._awaits_hook = False
        if decided:
            agreements = [(each.agreement, numbers) for each, numbers in decided]
            self._statistics.record(self.step - 1, agreements, self.max_consecutive_skips)
