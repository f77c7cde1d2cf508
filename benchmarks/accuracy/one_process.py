"""All ranks of a run in one process, one after the other: the same numbers as DDP, ten times sooner on few cores.

Only the travelling is left out. Gradients are judged and averaged by the package's own functions, as one bucket.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.accuracy import peers
from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.faults import fault_named
from benchmarks.accuracy.gradients import all_gradients, mean_distance
from benchmarks.accuracy.late import OneStepLate
from benchmarks.accuracy.rules import settings_of
from benchmarks.accuracy.task import Task
from benchmarks.accuracy.training import Record, build_network, build_optimizer
from gaf_ddp import GAFState, combine, gram
from gaf_ddp.rules.agreement import decide
from gaf_ddp.rules.held_out import TEMPERATURES

# From gradients (W, N), overwritten, to their average (None: no step), and who was kept (None: no filter).
Way = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def at_once(state: GAFState) -> Way:
    """Return what the hook does in model scope where it judges in the same step."""

    def filtered(rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        agreement = decide(gram(rows), state._weighting_at(state.step), state.max_norm_ratio)
        state.step += 1
        return combine(rows, agreement.weights) if agreement.agreed else None, agreement.kept

    return filtered


def way_of(run: Run, counts: Sequence[int]) -> Way:
    """Return how a run's gradients become one."""
    settings = settings_of(run, counts)
    if settings is None:
        average = peers.average_of(run.rule.name, run.rule.parameter) or (lambda rows: rows.mean(0))
        return lambda rows: (average(rows), None)
    state = GAFState(**{"scope": "model", **settings})
    return OneStepLate(state, len(run.ranks)) if state._is_late else at_once(state)


class OneProcess:
    """The ranks of a run without processes."""

    def __init__(self, run: Run, task: Task, counts: Sequence[int] = ()) -> None:
        self._run, self._task = run, task
        self.model = build_network(run, task)
        self.optimizer = build_optimizer(run, self.model)
        self._way = way_of(run, counts)
        self._fault_memory: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(run.seed)
        self._distances: list[Tensor] = []

    def step(self, index: int) -> Tensor | None:
        """Train one step; return which ranks were kept, `(W,)`, None without a filter."""
        batches = [self._task.batch(member, index) for member in range(len(self._run.ranks))]
        rows = all_gradients(self.model, batches)
        self._refer(index)
        self._break(rows)
        if self._run.rule.name == "averaging":
            self._distances.append(mean_distance(rows))
        average, kept = self._way(rows)
        if average is not None:
            self._update(average)
        return kept

    def distances(self) -> Record:
        """Return the mean cosine distance of two ranks' gradients in the first and in the last tenth of the steps.

        Nothing where a rule decides which steps are taken, or ranks are alone or broken.
        """
        if not self._distances or len(self._run.ranks) == 1 or self._run.fault is not None:
            return {}
        tenth = -(-len(self._distances) // 10)
        parts = {"first": self._distances[:tenth], "last": self._distances[-tenth:]}
        return {f"distance_{name}": float(torch.stack(part).mean()) for name, part in parts.items()}

    def _refer(self, index: int) -> None:
        """Read the held-out data, if it is time to."""
        told = self._run.rule.reference
        if told is not None and index and index % told.every == 0:
            assert isinstance(self._way, OneStepLate)
            references = list(self._task.references)
            with torch.no_grad():
                losses = [cross_entropy(self.model(x) / TEMPERATURES[-1], y) for x, y in references]
            readings = [all_gradients(self.model, references, t) for t in TEMPERATURES]
            self._way.read(readings, float(torch.stack(losses).mean()))

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
