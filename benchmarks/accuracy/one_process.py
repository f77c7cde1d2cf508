"""All ranks of a run in one process, one after the other: the same numbers as DDP, ten times sooner on few cores.

Only the travelling is left out. Gradients are judged by the package's own sketches, judges and `combine`. Momenta
alone differ: under DDP they begin anew after the first step, when it lays its buckets out anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import peers
from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.faults import fault_named
from benchmarks.accuracy.gradients import all_gradients
from benchmarks.accuracy.rules import settings_of
from benchmarks.accuracy.task import Task
from benchmarks.accuracy.training import build_network, build_optimizer
from gaf_ddp import Agreement, GAFState, combine
from gaf_ddp.exchange.sketched import as_long_as
from gaf_ddp.kernels.fold import fold


class Judged:
    """What the hook decides with these settings of `GAFState`, from whole gradients `(W, N)`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._state = GAFState(**{"scope": "model", **settings})

    def __call__(self, rows: Tensor) -> Agreement:
        """Return who counts at this step."""
        state = self._state
        if state.exchange == "sketch":
            rows = torch.stack([as_long_as(*fold(row, state.sketch_size, seed=0)) for row in rows])
        measured = state._judge.measure("gradient", rows)
        agreement = state._judge.decide(["gradient"], measured, state._weighting_now(), state.max_norm_ratio)
        state._judge.finish()
        state.step += 1
        return agreement


class OneProcess:
    """The ranks of a run without processes."""

    def __init__(self, run: Run, task: Task, counts: Sequence[int] = ()) -> None:
        self._run, self._task = run, task
        self.model = build_network(run, task)
        self.optimizer = build_optimizer(run, self.model)
        settings = settings_of(run, counts)
        self._judge = None if settings is None else Judged(settings)
        clips = run.rule.name == "clipping"
        self._average = peers.clipping(run.rule.parameter or 1.0) if clips else lambda rows: rows.mean(0)
        self._fault_memory: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(run.seed)

    def step(self, index: int) -> Tensor | None:
        """Train one step; return which ranks were kept, `(W,)`, None without a filter."""
        batches = [self._task.batch(member, index) for member in range(len(self._run.ranks))]
        rows = all_gradients(self.model, batches)
        self._break(rows)
        if self._judge is None:
            self._update(self._average(rows))
            return None
        agreement = self._judge(rows)
        if agreement.agreed:
            self._update(combine(rows, agreement.weights))
        return agreement.kept

    def _break(self, rows: Tensor) -> None:
        """Put the fault in place of the bad ranks' gradients."""
        fault, ranks = self._run.fault, self._run.ranks
        bad = [place for place, rank in enumerate(ranks) if fault is not None and rank in fault.all_ranks]
        if fault is None or not bad:
            return
        honest = rows[[place for place in range(len(ranks)) if place not in bad]]
        sent = fault_named(fault.kind)(honest, rows[bad[0]].clone(), self._fault_memory, self._random)
        rows[bad] = sent

    def _update(self, average: Tensor) -> None:
        """Step along a flat gradient `(N,)`."""
        parameters = list(self.model.parameters())
        for p, part in zip(parameters, torch.split(average, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()
