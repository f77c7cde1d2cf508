"""One rank of a run as a process under DDP, with the package's hook on it."""
# DDP checks the hook's annotations: no `from __future__ import annotations` here.

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.faults import fault_named
from benchmarks.accuracy.rules import settings_of
from benchmarks.accuracy.task import Task, build_task
from benchmarks.accuracy.training import Record, build_network, build_optimizer, train
from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement
from gaf_ddp.runtime.collectives import all_gather_single


def train_rank(device: torch.device, run: Run, folder: Path | None, counts: Sequence[int]) -> Record:
    """Train this rank's part of a run; return the run's record, which every rank has."""
    task = build_task(run, folder)
    rank = RealRank(run, task, counts)
    return train(run, task, rank.model, rank.step)


class RealRank:
    """The part of a run that is this process's; the process group is the run's ranks, in their order."""

    def __init__(self, run: Run, task: Task, counts: Sequence[int]) -> None:
        self._task, self.fault = task, run.fault
        self.model = build_network(run, task)
        self._optimizer = build_optimizer(run, self.model)
        self._ddp = DistributedDataParallel(self.model)
        self._every = 0 if run.rule.reference is None else run.rule.reference.every
        settings = settings_of(run, counts)
        self.state = None if settings is None else GAFState(**{"scope": "model", **settings})
        if self.state is not None:
            skip_on_disagreement(self._optimizer, self.state)
        self.bad = [place for place, rank in enumerate(run.ranks) if run.fault and rank in run.fault.all_ranks]
        if self.bad:
            self.memory: dict[str, Tensor] = {}
            self.random = torch.Generator().manual_seed(run.seed)
            self._ddp.register_comm_hook(self, _broken_hook)
        elif self.state is not None:
            self._ddp.register_comm_hook(self.state, gaf_hook)

    def step(self, index: int) -> Tensor | None:
        """Train one step; return which ranks were kept, `(W,)`, None without a filter."""
        images, labels = self._task.batch(dist.get_rank(), index)
        if self.state is not None and self._every and index % self._every == 0:
            held, answers = self._task.references[dist.get_rank()]
            self.state.reference(lambda temperature: cross_entropy(self._ddp(held) / temperature, answers))
        self._optimizer.zero_grad()
        cross_entropy(self._ddp(images), labels).backward()
        self._optimizer.step()
        return None if self.state is None or self.state.agreement is None else self.state.agreement.kept


def _broken_hook(
    rank: RealRank,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Show the bad ranks everyone's bucket, let them put their fault in their own, then go on as without it."""
    gradients = _in_order(rank.model, bucket)
    own = torch.cat([gradient.flatten() for gradient in gradients])
    rows = own.new_empty(dist.get_world_size(), own.numel())
    all_gather_single(rows.view(-1), own)
    if dist.get_rank() in rank.bad:
        assert rank.fault is not None
        honest = rows[[place for place in range(len(rows)) if place not in rank.bad]]
        sent = fault_named(rank.fault.kind)(honest, own, rank.memory, rank.random)
        for gradient, part in zip(gradients, torch.split(sent, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    if rank.state is not None:
        return gaf_hook(rank.state, bucket)
    assert dist.group.WORLD is not None
    future: torch.futures.Future[torch.Tensor] = allreduce_hook(dist.group.WORLD, bucket)
    return future


def _in_order(
    model: nn.Module,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> list[Tensor]:
    """Return the bucket's gradients in the model's order: DDP changes its own after the first step."""
    gradients = {id(p): g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
    return [gradients[id(p)] for p in model.parameters() if id(p) in gradients]
