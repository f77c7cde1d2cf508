"""One training run from start to record, whatever computes the ranks."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.resnet import resnet8
from benchmarks.accuracy.task import Task
from benchmarks.accuracy.transformer import Transformer
from launch.models import build_model

Record = dict[str, Any]
MOMENTUM = 0.9
EVALUATION_BATCH = 500


def build_network(run: Run, task: Task) -> nn.Module:
    """Return the run's network, initialised from its seed."""
    torch.manual_seed(run.seed)
    if run.model == "transformer":
        return Transformer(task.images.shape[1], task.classes)
    channels, height, width = task.images.shape[1:]
    if run.model == "resnet8":
        return resnet8(channels, task.classes)
    return build_model(run.model, (channels, height, width), task.classes)


def build_optimizer(run: Run, model: nn.Module) -> Optimizer:
    """Return the run's optimizer."""
    if run.optimizer == "adam":
        return Adam(model.parameters(), run.lr, weight_decay=run.weight_decay)
    return SGD(model.parameters(), run.lr, MOMENTUM, weight_decay=run.weight_decay, nesterov=True)


def train(run: Run, task: Task, model: nn.Module, step: Callable[[int], Tensor | None]) -> Record:
    """Train and evaluate a model; return what the tables need.

    step: trains one, and returns which ranks were kept, `(W,)` or `(decisions, W)`, None without a filter.
    A model that is not finite any more is given up: it keeps its last accuracy for the steps that are left.
    """
    begun = time.monotonic()
    kept: list[Tensor] = []  # (decisions, W) each
    curve: list[tuple[float, float, float]] = []  # validation, test, test on the classes seen by few
    for index in range(run.steps):
        decision = step(index)
        if decision is not None:
            kept.append(decision.reshape(-1, decision.shape[-1]).float())
        if (index + 1) % run.evaluate_every == 0:
            curve.append(_evaluate(model, task))
            if not all(bool(p.isfinite().all()) for p in model.parameters()):
                curve += [curve[-1]] * (run.steps // run.evaluate_every - len(curve))
                break
    return {
        **_accuracies(curve),
        **_shares(kept),
        **_learnt(model, task),
        "seconds": round(time.monotonic() - begun, 2),
    }


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
    """Return the shares of ranks kept and decisions skipped, and how many ranks were kept at each decision."""
    if not kept:  # without a filter everyone is
        return {"kept": 1.0, "skipped": 0.0, "kept_by_rank": [], "counts": []}
    table = torch.cat(list(kept))
    return {
        "kept": float(table.mean()),
        "skipped": float((table.sum(1) == 0).float().mean()),
        "kept_by_rank": [round(share, 4) for share in table.mean(0).tolist()],
        "counts": [round(count) for count in table.sum(1).tolist()],
    }


def _learnt(model: nn.Module, task: Task) -> Record:
    """Return what share of wrong labels the model has learnt, in %, where there are any."""
    if task.mislabelled is None:
        return {}
    model.eval()
    with torch.no_grad():
        share = _percent(_right(model, *task.mislabelled))
    model.train()
    return {"wrong_learnt": share}


@torch.no_grad()
def _evaluate(model: nn.Module, task: Task) -> tuple[float, float, float]:
    model.eval()
    validation, test = _right(model, *task.validation), _right(model, *task.test)
    model.train()
    return _percent(validation), _percent(test), _percent(test[task.few])


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    answers = [model(chunk).argmax(1) for chunk in torch.split(images, EVALUATION_BATCH)]
    return torch.cat(answers) == labels


def _percent(right: Tensor) -> float:
    return 100 * float(right.float().mean())
