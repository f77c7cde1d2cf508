"""All ranks of a run in one process, one after the other: the same numbers as DDP, ten times sooner on few cores.

Only the travelling is left out. Gradients are judged by the package's own `gram`, `decide` and `combine`. Momenta
alone differ: under DDP they begin anew after the first step, when it lays its buckets out anew.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.faults import FAULTS
from benchmarks.accuracy.gradients import all_gradients
from benchmarks.accuracy.rules import build_rule, vote_momentum
from benchmarks.accuracy.task import Task
from benchmarks.accuracy.training import build_network, build_optimizer
from gaf_ddp import combine, gram
from gaf_ddp.agreement import decide
from gaf_ddp.momenta import Momenta, judged
from launch.batches import augment

MEMORY_DECAY = 0.9  # of the running mean of past updates, for the rules that want one


class OneProcess:
    """The ranks of a run without processes."""

    def __init__(self, run: Run, task: Task, counts: Sequence[int] = ()) -> None:
        self._run, self._task = run, task
        self.model = build_network(run, task)
        self.optimizer = build_optimizer(run, self.model)
        self._parameters = list(self.model.parameters())
        self._rule = build_rule(run, counts)
        self._remembers = getattr(self._rule, "remembers", False)
        momentum = vote_momentum(run.rule)
        self._momenta = Momenta(momentum) if momentum else None
        self._segments = self._cut(run.scope)
        self._memory = torch.zeros(sum(p.numel() for p in self._parameters))
        self._fault_memory: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(run.seed)

    def step(self, index: int) -> Tensor | None:
        """Train one step; return which ranks were kept, `(decisions, W)`; None without a filter."""
        batches = [self._batch(member, index) for member in range(len(self._run.ranks))]
        rows = all_gradients(self.model, batches)
        self._break(rows)
        if self._rule is None:
            self._put(rows.mean(0), slice(None))
            self.optimizer.step()
            return None
        kept = torch.stack([self._filter(rows[:, segment], segment) for segment in self._segments])
        self.optimizer.step()
        return kept

    def share(self, value: float) -> float:
        """There is only one process to tell."""
        return value

    def _batch(self, member: int, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self._task.batch(member, index)
        return (augment(images, self._random) if self._run.augment else images), labels

    def _break(self, rows: Tensor) -> None:
        """Put the fault in place of the bad rank's gradient."""
        fault = self._run.fault
        if fault is None or fault.rank not in self._run.ranks:
            return
        bad = self._run.ranks.index(fault.rank)
        honest = rows[torch.arange(len(rows)) != bad]
        rows[bad] = FAULTS[fault.kind](honest, rows[bad].clone(), self._fault_memory, self._random)

    def _filter(self, rows: Tensor, segment: slice) -> Tensor:
        """Decide about one segment of the gradient and leave the result in `p.grad`."""
        assert self._rule is not None
        if self._remembers:
            rows = torch.cat([rows, self._memory[None, segment]])
        key = segment.start
        gramian = gram(rows) if self._momenta is None else judged(self._momenta.measure(key, rows))
        agreement = decide(gramian, self._rule, self._run.guard)
        if self._momenta is not None:
            self._momenta.forget(key, agreement.nonfinite | agreement.overlong)
        self._put(combine(rows, agreement.weights) if agreement.agreed else None, segment)
        if self._remembers and agreement.agreed:
            self._memory[segment].lerp_(combine(rows, agreement.weights), 1 - MEMORY_DECAY)
        return agreement.kept[: len(self._run.ranks)]

    def _put(self, update: Tensor | None, segment: slice) -> None:
        """Write a part of the flat gradient into the parameters it covers; None leaves them out of the step."""
        begin, end = segment.start or 0, segment.stop or len(self._memory)
        at = 0
        for p in self._parameters:
            if begin <= at < end:
                p.grad = None if update is None else update[at - begin : at - begin + p.numel()].view_as(p)
            at += p.numel()

    def _cut(self, scope: str) -> list[slice]:
        """What one decision is about: the whole gradient, or in bucket scope each layer's."""
        layers = [m for m in self.model.modules() if any(True for _ in m.parameters(recurse=False))]
        sizes = [sum(p.numel() for p in layer.parameters(recurse=False)) for layer in layers]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        if scope == "model":
            return [slice(0, ends[-1])]
        return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
