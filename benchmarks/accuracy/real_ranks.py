"""One rank of a run as a process under DDP, with the package's hook on it."""
# DDP checks the hook's annotations: no `from __future__ import annotations` here.

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.faults import FAULTS
from benchmarks.accuracy.rules import build_rule, vote_momentum
from benchmarks.accuracy.task import Task
from benchmarks.accuracy.training import build_network, build_optimizer
from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement
from gaf_ddp.collectives import all_gather_single
from launch.batches import augment


class RealRank:
    """The part of a run that is this process's; the process group is the run's ranks, in their order."""

    def __init__(self, run: Run, task: Task, device: torch.device, counts: Sequence[int] = ()) -> None:
        self._run, self._task, self._device = run, task, device
        self._member = dist.get_rank()
        self.model = build_network(run, task).to(device)
        self.optimizer = build_optimizer(run, self.model)
        self._ddp = DistributedDataParallel(self.model)
        self._random = torch.Generator().manual_seed(run.seed)
        self._state = self._attach(counts)

    def step(self, index: int) -> Tensor | None:
        """Train one step; return which ranks were kept, `(W,)` or `(decisions, W)`; None without a filter."""
        images, labels = self._task.batch(self._member, index)
        if self._run.augment:
            images = augment(images, self._random)
        self.optimizer.zero_grad()
        cross_entropy(self._ddp(images.to(self._device)), labels.to(self._device)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return None if self._state is None or self._state.agreement is None else self._state.agreement.kept

    def share(self, value: float) -> float:
        """The first rank's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def _attach(self, counts: Sequence[int]) -> GAFState | None:
        """Register the run's rule, with the fault before it if there is one."""
        rule = build_rule(self._run, counts)
        if getattr(rule, "remembers", False):
            raise ValueError(f"engine must be 'one process' for rule {self._run.rule.name!r}, found 'ddp'")
        state = None
        if rule is not None:
            state = GAFState(
                weighting=rule,
                scope=self._run.scope,
                max_norm_ratio=self._run.guard,
                vote_momentum=vote_momentum(self._run.rule),
            )
            skip_on_disagreement(self.optimizer, state)
        fault = self._run.fault
        if fault is not None and fault.rank in self._run.ranks:
            self._ddp.register_comm_hook(_Broken(self._run, self.model, state), _broken_hook)
        elif state is not None:
            self._ddp.register_comm_hook(state, gaf_hook)
        return state


class _Broken:
    """What the wrapper hook needs: the fault, its memory, and the state of the hook below it (None: averaging)."""

    def __init__(self, run: Run, model: nn.Module, state: GAFState | None) -> None:
        assert run.fault is not None
        assert dist.group.WORLD is not None
        self.group = dist.group.WORLD
        self.state = state
        self.place = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        self.bad = run.ranks.index(run.fault.rank)
        self.fault = FAULTS[run.fault.kind]
        self.memory: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(run.seed)


def _broken_hook(
    broken: _Broken,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Show the bad rank everyone's bucket, let it put its fault in its own, then go on as without it."""
    gradients = _in_order(broken, bucket)
    own = torch.cat([gradient.flatten() for gradient in gradients])
    rows = own.new_empty(dist.get_world_size(), own.numel())
    all_gather_single(rows.view(-1), own)
    if dist.get_rank() == broken.bad:
        honest = rows[torch.arange(len(rows)) != broken.bad]
        sent = broken.fault(honest, own, broken.memory, broken.random)
        for gradient, part in zip(gradients, torch.split(sent, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    if broken.state is None:
        future: torch.futures.Future[torch.Tensor] = allreduce_hook(broken.group, bucket)
        return future
    return gaf_hook(broken.state, bucket)


def _in_order(
    broken: _Broken,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> list[Tensor]:
    """The bucket's gradients in the model's order: DDP changes its own after the first step."""
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    return [gradient for _, gradient in sorted(pairs, key=lambda pair: broken.place[id(pair[0])])]
