"""One run: one method trained from one seed, step by step, and all that must be saved to go on with it."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gaf_ddp import audit, check_replicas
from launch.batches import RandomBatches, augment, batches, source
from launch.data import Data, Split
from launch.labels import add_label_noise, shift_labels
from launch.messages import gathered, summed
from launch.methods import attach
from launch.models import build_model
from launch.ranks import Here, together
from launch.records import Record
from launch.settings import Plan

EVALUATION_BATCH = 500
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Holds the model and everything that changes with it; one per run."""

    def __init__(self, plan: Plan, data: Data, here: Here, seed: int, method: str) -> None:
        self.plan, self.data, self.here, self.seed, self.method = plan, data, here, seed, method
        noisy = add_label_noise(data.train.labels, data.classes, plan.label_noise, seed)
        wrong = here.rank in plan.corrupt_ranks
        self._train = data.train.relabelled(shift_labels(noisy, data.classes) if wrong else noisy)
        torch.manual_seed(seed)
        network = together(lambda: build_model(plan.model, data.shape, data.classes).to(here.device))
        self.model = DistributedDataParallel(network, process_group=here.group)
        self.optimizer = _optimizer(plan, self.model)
        self.state = attach(method, self.model, self.optimizer, plan, here)
        self._schedule = LambdaLR(self.optimizer, _factor(plan))
        self._scaler = torch.amp.GradScaler(here.device.type, enabled=plan.amp == "fp16")
        self._loss = torch.zeros((), device=here.device)  # summed since the last evaluation
        self._evaluated = 0  # the step of the last evaluation

    def steps(self, start: int) -> Iterator[int]:
        """Train from step `start` to the end; yield the number of steps made, after each."""
        for step, batch in enumerate(self._batches(start, self.plan.steps), start + 1):
            self._loss += self._backward(*batch)
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.optimizer.zero_grad()
            self._schedule.step()
            self._watch(step, batch)
            yield step

    def evaluate(self, step: int) -> Record:
        """Measure accuracy on clean test data, every rank on its share of it, and sum up the steps before."""
        self._share_buffers()
        right, seen, loss = summed(*self._count_right(), self._loss.item()).tolist()
        steps, self._evaluated = step - self._evaluated, step
        self._loss.zero_()
        agreement = {} if self.state is None else self.state.summary(reset=True)
        everyone = range(self.here.world)
        return Record(
            method=self.method,
            seed=self.seed,
            step=step,
            accuracy=100 * right / seen,
            loss=loss / (steps * self.here.world),
            lr=float(self._schedule.get_last_lr()[0]),
            skipped=agreement.get("gaf/skipped_fraction", 0.0),
            kept=[agreement.get(f"gaf/kept_rank_{rank:02d}", 1.0) for rank in everyone],
            cosine=agreement.get("gaf/mean_cosine"),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later job needs to go on as if this one had not stopped; a collective."""
        parts = {"model": self.model.module, "optimizer": self.optimizer, "schedule": self._schedule}
        saved: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        saved["scaler"] = self._scaler.state_dict()
        saved["gaf"] = None if self.state is None else self.state.state_dict()
        return {**saved, "evaluated": self._evaluated, "losses": gathered(self._loss.item())}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._settle()
        self.model.module.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
        self._scaler.load_state_dict(saved["scaler"])
        if self.state is not None:
            self.state.load_state_dict(saved["gaf"])
        self._evaluated = saved["evaluated"]
        # With other ranks than before, the sum over the ranks is what counts.
        losses, world, rank = saved["losses"], self.here.world, self.here.rank
        self._loss.fill_(losses[rank] if len(losses) == world else sum(losses) / world)

    def _settle(self) -> None:
        """Make one backward and forget it.

        DDP lays out its buckets anew after the first one, and the order of additions follows from the layout:
        without this the first step after a resume would differ in the last bits from an uninterrupted job.
        """
        self._backward(*next(self._batches(0, 1)))
        self.optimizer.zero_grad()

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan, rank = self.plan, self.here.rank
        indices = RandomBatches(len(self._train), plan.batch_size, self.seed, rank, start, stop)
        for step, (images, labels) in enumerate(self._read(self._train, indices), start):
            if plan.augment:
                images = augment(images, source(self.seed, rank, step, 1))
            yield self._moved(images), self._moved(labels)

    def _read(self, split: Split, indices: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(split, indices, self.plan.workers, pinned=self.here.device.type == "cuda")

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.here.device, non_blocking=True)

    def _watch(self, step: int, batch: tuple[Tensor, Tensor]) -> None:
        """Compare the replicas, and what ranks make of one batch, where the user wants it."""
        if self.plan.check_every and step % self.plan.check_every == 0:
            together(lambda: check_replicas(self.model, self.optimizer))
        if self.plan.audit_every and step % self.plan.audit_every == 0:
            together(lambda: audit(self.model, self._loss_of, batch).require_equal())

    def _loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            return functional.cross_entropy(self.model(images), labels)

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = self._loss_of(images, labels)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.amp == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.here.device.type, AUTOCAST[self.plan.amp])

    def _share_buffers(self) -> None:
        """Give every rank rank 0's running statistics, which it saves and which DDP trains with."""
        for buffer in self.model.module.buffers():
            dist.broadcast(buffer, 0, group=self.here.group)

    @torch.no_grad()
    def _count_right(self) -> tuple[float, float]:
        """Return right answers and questions of this rank's share of the test set."""
        network, test = self.model.module.eval(), self.data.test
        right = torch.zeros((), device=self.here.device)
        mine = range(self.here.rank, len(test), self.here.world)
        for images, labels in self._read(test, _chunks(mine)):
            with self._autocast():
                answers = network(self._moved(images)).argmax(1)
            right += (answers == self._moved(labels)).sum()
        network.train()
        return right.item(), float(len(mine))


def _chunks(indices: range) -> list[list[int]]:
    return [list(indices[at : at + EVALUATION_BATCH]) for at in range(0, len(indices), EVALUATION_BATCH)]


def _optimizer(plan: Plan, model: DistributedDataParallel) -> Optimizer:
    decay, rate = plan.weight_decay, plan.lr
    if plan.optimizer == "sgd":
        nesterov = plan.momentum > 0
        return SGD(model.parameters(), rate, momentum=plan.momentum, weight_decay=decay, nesterov=nesterov)
    kind = Adam if plan.optimizer == "adam" else AdamW
    return kind(model.parameters(), rate, weight_decay=decay)


def _factor(plan: Plan) -> Any:
    """Return the learning rate at each step, as a share of the first."""
    if plan.schedule == "none":
        return lambda step: 1.0
    return lambda step: (1 + math.cos(math.pi * step / plan.steps)) / 2
