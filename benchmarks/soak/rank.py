"""One rank of a soak."""

import copy
import gc
import hashlib
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from benchmarks.soak.segments import SETTINGS, Given, Segment, draw, spoilt
from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement

_COMPARED_EVERY, _SAMPLED_EVERY = 5, 100  # steps


class Soak:
    """Train through segments, compare replicas and watch what the process holds.

    Args:
        seed: of everything.
        with_filter: or DDP as it is, through the same models without gradients that would end them.
        longest: steps of a segment.
    """

    def __init__(self, seed: int, with_filter: bool, longest: int) -> None:
        self._seed, self._rank, self._longest = seed, dist.get_rank(), longest
        self._states = [GAFState(**settings) for settings in SETTINGS] if with_filter else []
        self.steps = self.compared = self.differed = self.restarts = self.joined = 0
        self.samples: list[dict[str, int]] = []

    def run(self, steps: int) -> None:
        """Go through segments until so many steps are taken."""
        number = 0
        while self.steps < steps:
            self._segment(draw(self._seed, number, self._longest), number)
            number += 1

    def _segment(self, segment: Segment, number: int) -> None:
        torch.manual_seed(hash((self._seed, number, self._rank)))
        model, optimizer = self._make(segment, Given(segment.sizes))
        undo = self._skip(segment, optimizer)
        inputs = segment.steps - segment.steps // 6 * self._rank * segment.joins
        self.joined += segment.joins
        uneven: Any = Join([model]) if segment.joins else nullcontext()
        with uneven:
            for step in range(inputs):
                if step == segment.restarts_at:
                    undo()
                    model, optimizer = self._restart(segment, model, optimizer)
                    undo = self._skip(segment, optimizer)
                self._step(segment, step, model, optimizer)
                if not segment.joins:
                    self._count(model)
        undo()
        if segment.joins:
            self._compare(model)
            for _ in range(segment.steps):
                self._count(model)

    def _make(self, segment: Segment, net: nn.Module) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
        model = DistributedDataParallel(net, bucket_cap_mb=segment.cap, find_unused_parameters=segment.unused)
        if self._states:
            model.register_comm_hook(self._states[segment.setting], gaf_hook)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def _skip(self, segment: Segment, optimizer: torch.optim.Optimizer) -> Any:
        if self._states and "tau" in SETTINGS[segment.setting]:
            return skip_on_disagreement(optimizer, self._states[segment.setting])
        return lambda: None

    def _restart(self, segment: Segment, model: Any, optimizer: Any) -> tuple[Any, Any]:
        """Save everything, make it anew, and load."""
        net, saved = Given(segment.sizes), copy.deepcopy(optimizer.state_dict())
        net.load_state_dict(model.module.state_dict())
        if self._states:
            saved_state = copy.deepcopy(self._states[segment.setting].state_dict())
            self._states[segment.setting] = GAFState(**SETTINGS[segment.setting])
            self._states[segment.setting].load_state_dict(saved_state)
        model, optimizer = self._make(segment, net)
        optimizer.load_state_dict(saved)
        self.restarts += 1
        return model, optimizer

    def _step(self, segment: Segment, step: int, model: Any, optimizer: Any) -> None:
        kind = segment.kinds[step][self._rank]
        gradients = torch.randn(sum(segment.sizes)) + 1
        gradients = spoilt(gradients, kind if self._states else "plain")
        used = segment.used[step][self._rank] if segment.unused else [True] * len(segment.sizes)
        is_local = segment.local[step] and step + 1 < segment.steps
        with model.no_sync() if is_local else nullcontext():
            model(gradients, used).backward()
        if is_local:
            return
        if all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):  # as GradScaler would
            optimizer.step()
        optimizer.zero_grad()

    def _count(self, model: nn.Module) -> None:
        self.steps += 1
        if self.steps % _COMPARED_EVERY == 0:
            self._compare(model)
        if self.steps % _SAMPLED_EVERY == 0:
            gc.collect()
            self.samples.append({"step": self.steps, **held()})

    def _compare(self, model: nn.Module) -> None:
        """Compare all bits of the parameters between the ranks, by a hash."""
        digest = hashlib.blake2b(digest_size=7)
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        number = int.from_bytes(digest.digest(), "big")
        both = torch.tensor([number, -number])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        self.compared += 1
        self.differed += int(both.sum() != 0)


def held() -> dict[str, int]:
    """Return what this process holds now: kilobytes of memory, threads, file descriptors."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    descriptors = len(os.listdir("/proc/self/fd"))
    return {
        "kilobytes": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "descriptors": descriptors,
    }


def soak(device: torch.device, seed: int, steps: int, with_filter: bool, longest: int) -> dict[str, Any]:
    """Be one rank; return what was counted."""
    found = Soak(seed, with_filter, longest)
    found.run(steps)
    decided = {str(i): state.step for i, state in enumerate(found._states)}
    names = ("steps", "compared", "differed", "restarts", "joined", "samples")
    return {**{name: getattr(found, name) for name in names}, "steps by state": decided}
