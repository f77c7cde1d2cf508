"""All ranks of a run in one process, one after the other: the same numbers as DDP, ten times sooner on few cores.

Only the travelling is left out. Gradients are judged by the package's own `gram`, `decide` and `combine`. Momenta
alone differ: under DDP they begin anew after the first step, when it lays its buckets out anew.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.faults import FAULTS
from benchmarks.accuracy.gradients import all_gradients
from benchmarks.accuracy.rules import settings_of
from benchmarks.accuracy.task import Task
from benchmarks.accuracy.training import build_network, build_optimizer
from gaf_ddp import Agreement, combine, gram
from gaf_ddp.agreement import decide
from gaf_ddp.momenta import Momenta, judged

MAX_NORM_RATIO = 10.0  # GAFState's default


class Judge:
    """What the hook decides with `GAFState(weighting=…, vote_momentum=…)`, from whole gradients `(W, N)`."""

    def __init__(self, weighting: Callable[[Tensor], Tensor], vote_momentum: float = 0.0) -> None:
        self._weighting = weighting
        self._momenta = Momenta(vote_momentum) if vote_momentum else None

    def __call__(self, rows: Tensor) -> Agreement:
        """Return who counts at this step."""
        if self._momenta is None:
            return decide(gram(rows), self._weighting, MAX_NORM_RATIO)
        agreement = decide(judged(self._momenta.measure(0, rows)), self._weighting, MAX_NORM_RATIO)
        self._momenta.forget(0, agreement.nonfinite | agreement.overlong)
        return agreement


class OneProcess:
    """The ranks of a run without processes."""

    def __init__(self, run: Run, task: Task, counts: Sequence[int] = ()) -> None:
        self._run, self._task = run, task
        self.model = build_network(run, task)
        self.optimizer = build_optimizer(run, self.model)
        settings = settings_of(run, counts)
        self._judge = None if settings is None else Judge(**settings)
        self._fault_memory: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(run.seed)

    def step(self, index: int) -> Tensor | None:
        """Train one step; return which ranks were kept, `(W,)`, None without a filter."""
        batches = [self._task.batch(member, index) for member in range(len(self._run.ranks))]
        rows = all_gradients(self.model, batches)
        self._break(rows)
        if self._judge is None:
            self._update(rows.mean(0))
            return None
        agreement = self._judge(rows)
        if agreement.agreed:
            self._update(combine(rows, agreement.weights))
        return agreement.kept

    def _break(self, rows: Tensor) -> None:
        """Put the fault in place of the bad rank's gradient."""
        fault = self._run.fault
        if fault is None or fault.rank not in self._run.ranks:
            return
        bad = self._run.ranks.index(fault.rank)
        honest = rows[torch.arange(len(rows)) != bad]
        rows[bad] = FAULTS[fault.kind](honest, rows[bad].clone(), self._fault_memory, self._random)

    def _update(self, average: Tensor) -> None:
        """Step along a flat gradient `(N,)`."""
        parameters = list(self.model.parameters())
        for p, part in zip(parameters, torch.split(average, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()
