"""One training run from start to record, whatever computes the ranks."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.task import Task
from launch.models import build_model

Record = dict[str, Any]
EVALUATION_BATCH = 500


class Ranks(Protocol):
    """The ranks of a run: they hold a model, and make a step of training together."""

    model: nn.Module
    optimizer: Optimizer

    def step(self, index: int) -> Tensor | None:
        """Train one step; return which ranks were kept, `(W,)` or `(decisions, W)`; None without a filter."""
        ...

    def share(self, value: float) -> float:
        """The first rank's value, on every rank."""
        ...


def build_network(run: Run, task: Task) -> nn.Module:
    """The run's network, initialised from its seed."""
    torch.manual_seed(run.seed)
    channels, height, width = task.images.shape[1:]
    return build_model(run.model, (channels, height, width), task.classes)


def build_optimizer(run: Run, model: nn.Module) -> Optimizer:
    """The run's optimizer; SGD is Nesterov's where it has momentum."""
    if run.optimizer == "adamw":
        return AdamW(model.parameters(), run.lr, weight_decay=run.weight_decay)
    nesterov = run.momentum > 0
    return SGD(model.parameters(), run.lr, run.momentum, weight_decay=run.weight_decay, nesterov=nesterov)


def train(run: Run, task: Task, ranks: Ranks) -> Record:
    """Train and evaluate; return what the tables need.

    A model that is not finite any more is given up: it keeps its last accuracy for the steps that are left.
    """
    begun = time.monotonic()
    schedule = ReduceLROnPlateau(ranks.optimizer, mode="max", patience=5) if run.schedule == "plateau" else None
    kept: list[Tensor] = []  # (decisions, W) each
    curve: list[tuple[float, float, float]] = []  # validation, test, test on the classes seen by few
    for index in range(run.steps):
        decision = ranks.step(index)
        if decision is not None:
            kept.append(decision.reshape(-1, decision.shape[-1]).float().cpu())
        if (index + 1) % run.evaluate_every == 0:
            curve.append(_evaluate(ranks.model, task))
            if schedule is not None:
                schedule.step(ranks.share(curve[-1][0]))
            if not all(bool(p.isfinite().all()) for p in ranks.model.parameters()):
                curve += [curve[-1]] * (run.steps // run.evaluate_every - len(curve))
                break
    return {**_accuracies(curve), **_shares(kept), "seconds": round(time.monotonic() - begun, 2)}


def _accuracies(curve: Sequence[tuple[float, float, float]]) -> Record:
    validation, test, few = zip(*curve, strict=True)
    return {
        "final": sum(test[-3:]) / len(test[-3:]),
        "best": max(test),
        "stopped": test[max(range(len(test)), key=lambda i: validation[i])],  # the first of equals
        "few": sum(few[-3:]) / len(few[-3:]),
        "curve": [round(accuracy, 2) for accuracy in test],
    }


def _shares(kept: Sequence[Tensor]) -> Record:
    """Shares of ranks kept and decisions skipped; counts: ranks kept at each decision. No filter keeps all."""
    if not kept:
        return {"kept": 1.0, "skipped": 0.0, "kept_by_rank": [], "counts": []}
    table = torch.cat(list(kept))
    return {
        "kept": float(table.mean()),
        "skipped": float((table.sum(1) == 0).float().mean()),
        "kept_by_rank": [round(share, 4) for share in table.mean(0).tolist()],
        "counts": [round(count) for count in table.sum(1).tolist()],
    }


@torch.no_grad()
def _evaluate(model: nn.Module, task: Task) -> tuple[float, float, float]:
    model.eval()
    right = _right(model, *task.test)
    validation = _right(model, *task.validation)
    model.train()
    return 100 * _mean(validation), 100 * _mean(right), 100 * _mean(right[task.few])


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    device = next(model.parameters()).device
    guesses = [model(chunk.to(device)).argmax(1).cpu() for chunk in torch.split(images, EVALUATION_BATCH)]
    return torch.cat(guesses) == labels


def _mean(right: Tensor) -> float:
    return float(right.float().mean())
