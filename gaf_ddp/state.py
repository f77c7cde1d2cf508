"""GAFState: the settings of the hook, where it is in training, and what it saw."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from gaf_ddp.ballots.judge import Judge
from gaf_ddp.monitor.records import Decision, Records
from gaf_ddp.monitor.report import Report
from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.saving import from_dict, to_dict
from gaf_ddp.settings import Settings, require
from gaf_ddp.way import Way


class GAFState(Settings):
    """Settings, step counter and statistics of `gaf_hook`. `GAFState()` needs none of the settings.

    Which ranks count:
        `GAFState()`: the consensus rule (`ConsensusAgreement`) over the last hundred steps, one step late. Nothing to
            tune, and an all-reduce's traffic. `weighting=ConsensusAgreement(ratio)` sets its ratio.
        tau: largest cosine distance at which two gradients agree, in [0, 2], or a schedule from `state.step` to it.
            `GAFState(tau=t)` filters with `NeighborhoodAgreement(t)`, exactly, in the same step.
        weighting: any callable from Gramian `(W, W)` to weights `(W,)`, the same on every rank: seed one that draws
            random numbers. It judges in the same step too.
        watch: judge and record, but average everyone, to the bit as torch's `allreduce_hook` does.

    For the consensus rule:
        momentum: decay of what ranks are judged by, per step, in [0, 1).
        judge_every: steps from one verdict to the next. None: as few, from 1 to 8, as keep what ranks send for it below
            a hundredth of the gradient's bytes; 1 up to 16 ranks.
        sketch_size: k, numbers that a rank's gradient is judged by, at least 64.
        voters: `"rank"`, or `"host"`: all ranks of a host are judged as one.
        check_every: every so many steps check that all ranks have the same parameters, to the bit, and that each
            average is that of the gradients that ranks voted with. With tau and weighting the parameters alone. Never
            under FSDP2.
        replica_group: the ranks that hold the rest of this replica's model: tensor parallel, pipeline. A replica has
            one vote and one verdict, two steps late. `check_every` compares parameters alone then. Each stage of a
            pipeline checks its own part of the gradient for norms that are too large, NaN and infinity. A group that
            nothing else uses, and that has been used once: see `attach(mesh=…)`, which makes one.

    For tau and weighting:
        scope: `"bucket"` (None), one decision per DDP bucket; `"model"`, one per step on the whole gradient, as the
            paper has it: no bucket is averaged before the last one has come.
        exchange: `"sharded"` (a ring all-reduce's bytes), `"gather"` (the plain reading), `"sketch"` (cosines to
            1/√sketch_size, the library's all-reduce). `"auto"`: sharded; on accelerators gather for small buckets.
        max_consecutive_skips: end with RuntimeError, on every rank, once nothing agreed in more than so many steps in
            a row; on accelerators a step later. None never ends it.

    For both:
        process_group: the group DDP was built with; None is the default group at the first bucket.
        start_step: plain averaging before this step.
        wire_dtype: dtype the gradients travel in, e.g. `torch.bfloat16`.
        max_norm_ratio: largest norm of a gradient, in upper medians of the norms of the ranks that count. The consensus
            rule shortens a longer gradient to it, by the last verdict's norms; with tau and weighting it has no vote.
            None is no limit.

    tau, weighting, start_step, max_norm_ratio and watch may be assigned while training, on every rank alike; a
    difference is raised on all, a step later at most. The others hold from the first bucket on. One state, one model.

    Attributes:
        step: synchronised backwards seen so far.
        agreement: the last step's `Agreement`, on the device, in bucket scope stacked; with the consensus rule that of
            the last ballots, on the host, for which it waits. None before the first.
        decisions: a list of them, each with its parameters: one a bucket in bucket scope, else one.

    Holds 2 W k numbers for the consensus rule, for tau and weighting what their exchange holds. Pickled, it loses its
    process group.

    Raises:
        ValueError: a setting is out of its range; the message names it.
        AttributeError: a setting is assigned that holds from the first bucket on.
    """

    def _start(self) -> None:
        self.step = 0
        self._records = Records()
        self._judge = self._new_judge()
        self._awaits_hook = False  # attached, and no step since
        self._way: Way | None = None  # what gradients go through,
        self._model: Any = None  # and whose they are: `connect` makes both

    @property
    def decisions(self) -> list[Decision]:
        """The last step's decisions with their parameters: one in model scope, else one per bucket."""
        self._catch_up()
        return self._records.decisions

    @property
    def agreement(self) -> Agreement | None:
        """The last step's record; in bucket scope each field has a leading dimension, one entry per bucket."""
        records = [decision.agreement for decision in self.decisions]
        if self.scope == "bucket" and not self._is_late and records:
            return Agreement.stack(records)
        return records[0] if records else None

    def summary(self, reset: bool = True) -> dict[str, float]:
        """Return the statistics of the decisions since the last reset, the same on every rank; waits for the last one.

        `gaf/kept_fraction`, `gaf/nonfinite_fraction`, `gaf/overlong_fraction`, `gaf/zero_fraction`: means over ranks
            and decisions; `gaf/skipped_fraction`: decisions in which nothing agreed.
        `gaf/kept_rank_00` …: the share of decisions that kept the rank, of those for which it had not finished.
        `gaf/out_rank_00` …: for how many steps in a row, up to now, the rank has been left out.
        `gaf/distance_rank_00` …: with the consensus rule its mean z, each at most 100.
        `gaf/mean_cosine`: over pairs of ranks. `gaf/noise_scale`: the gradient noise scale, in batches of one rank.

        NaN is what is not known; before the first decision there are no keys. Rank 0 warns if most decisions found no
        agreement, and of ranks that were out for 200 steps in a row.

        Raises:
            ValueError, RuntimeError: what the hook would raise in the next step.
        """
        if self._awaits_hook:
            warnings.warn("gaf_ddp: attached, but no gradient came: is the wrapped model called?", stacklevel=2)
            self._awaits_hook = False
        self._catch_up()
        return self._records.statistics.summary(self.step, reset, self.max_norm_ratio)

    def reference(self, loss: Callable[[float], Tensor]) -> None:
        """Judge the ranks by held-out data too: it tells honest ranks with unusual data from bad ones.

            if step % 20 == 0:
                state.reference(lambda temperature: criterion(model(inputs) / temperature, targets))

        Call it on every rank, between steps, every 10 to 20 of them (rank 0 warns if fewer), with each rank's own share
        of 200 examples or so in all (64 were too few against a bad majority). Nobody may train on them, and they must
        cover what the model has to learn. It finds a bad majority too. Takes effect a few steps later. Its gradient is
        read twice and folded, not averaged: `.grad`, buffers, torch's random state, DDP and the next step are as if it
        had not been called.

        Costs two forwards and backwards of the share, one gradient's memory, and 8 k bytes more in one ballot. Before
        the first step it returns at once. Under FSDP2 there must be no gradients that wait to be reduced.

        Args:
            loss: from a temperature, 1 or 2, to the loss of logits divided by it; a loss without logits may ignore it.
                A loss scaled for mixed precision does as well. Checkpoints in it must have `use_reentrant=False`.

        Raises:
            TypeError: loss is not callable, or returned something else than one number with a gradient.
            ValueError: tau or a weighting judges, which has no use for it.
            RuntimeError: in a later step, on every rank: it was called on some ranks only.
        """
        if not callable(loss):
            raise TypeError(f"loss must be callable, from a temperature to the loss, found {loss!r}")
        rule = "reference is for the consensus rule: tau and weighting must be None"
        require(self._is_consensus, rule, self.tau if self.weighting is None else self.weighting)
        if self._way is not None:
            self._records.statistics.note_reading(self.step)
            self._way.read(loss)

    def report(self) -> Report:
        """Return where each rank stands; waits and raises as `summary()` does.

        At the end of a job call it on every rank before any of them exits: else the last ballots are lost.
        """
        self._catch_up()
        found = self._records.statistics.report(self.step, self.max_norm_ratio)
        held_out = self._judge is not None and self._judge.has_held_out
        return replace(found, watch=self.watch, is_consensus=self._is_consensus, has_held_out=held_out)

    def advance(self) -> None:
        """End a step of `filter_parameters`, a collective; RuntimeError if the state filters no parameters."""
        (self._way or Way()).advance()

    def state_dict(self) -> dict[str, Any]:
        """Return what training needs to go on, at a host sync: step, statistics, the consensus rule's memory.

        Plain numbers in lists, and bytes without code, the same keys always: torch.distributed.checkpoint can load it.
        A ballot of several steps that is not full yet (`judge_every`) is not in it.
        """
        return to_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`; ValueError if it is something else, nothing is changed then.

        Of another world size, what is known of ranks starts anew.
        """
        from_dict(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the process group, what hangs on it, and the memory of ranks' gradients."""
        left: dict[str, Any] = dict.fromkeys(("process_group", "replica_group", "_way", "_model"))
        return {**self.__dict__, **left, "_is_connected": False, "_judge": self._new_judge(), "_awaits_hook": False}

    def _new_judge(self) -> Judge | None:
        return None if self._ratio is None else Judge(self._ratio, self.momentum)

    def _catch_up(self) -> None:
        """Read what is still on its way from the other ranks or from the device."""
        if self._way is not None:
            self._way.draw()
        self._records.read(self.max_consecutive_skips)

    def _end_step(self) -> None:
        self.step += 1
        self._awaits_hook = False
