"""Experiments on natural images, from a folder the user names."""

from dataclasses import replace

from benchmarks.accuracy.arms import ALL
from benchmarks.accuracy.declare import Experiment, Labels, Run
from benchmarks.accuracy.on_digits import digits_run


def _cifar(world: int, batch: int, steps: int) -> Run:
    return Run("small cifar10", "conv", tuple(range(world)), batch, steps, lr=0.05, evaluate_every=25)


def candidates() -> list[Experiment]:
    """Other rules, each beside its own random controls; on images only those that gained anything on digits."""
    keys = ("neighborhood", "momenta 0.5", "momenta 0.7", "quantile 0.3", "layers", "soft 1", "soft 3")
    more = (*keys, "quantile 0.6", "memory 0.9", "memory 1")
    noise = Labels("uniform", share=0.4)
    digits = replace(digits_run(4, 20, 1000), labels=noise, evaluate_every=50)
    cifar = replace(_cifar(4, 16, 400), labels=noise)
    return [
        Experiment(
            f"candidates {base.data}",
            "candidates",
            f"{base.data}, W=4, batch {base.batch}, 40 % of the labels random",
            base,
            ("averaging", "best lr", "decay", *(arm for key in tried for arm in _with_controls(key))),
            tau=tau,
            lrs=lrs,
            seeds=seeds,
            notes={"panel": base.data},
        )
        for base, tau, lrs, seeds, tried in (
            (digits, 0.8, (0.002, 0.005, 0.0125, 0.05), 5, more),
            (cifar, 0.9, (0.02, 0.05), 3, keys),
        )
    ]


def _with_controls(key: str) -> tuple[str, ...]:
    if key == "neighborhood":
        return key, "random members", "random skips"
    shuffled = (f"{key}: shuffled",) if key.startswith("soft") else ()  # of equal weights, that is random members
    return key, f"{key}: random members", f"{key}: random skips", *shuffled


def human() -> list[Experiment]:
    """CIFAR-10N on a small CIFAR-10; needs --data-dir."""
    few = ("averaging", "best lr", "random members", "random skips", "neighborhood", "momenta 0.7", "sequential",
           "oracle")  # fmt: skip
    settings = {
        "`worse` labels everywhere": (Labels("human", column="worse"), ALL),
        "`aggregate` labels everywhere": (Labels("human", column="aggregate"), few),
        "`worse` labels on rank 0 of 4": (Labels("human", (0,), column="worse"), ALL),
        "wrong label map on rank 0 of 4": (Labels("shift", (0,)), few),
    }
    return [
        Experiment(
            f"human {name.replace('`', '')}",
            "human",
            f"CIFAR-10 (16x16, 2500 images), W=4, batch 16, {name}",
            replace(_cifar(4, 16, 400), labels=labels),
            arms,
            tau=0.9,
            bad=labels.ranks,
            lrs=(0.02, 0.05),
            notes={"panel": name.replace("`", "")},
        )
        for name, (labels, arms) in settings.items()
    ]


def paper() -> list[Experiment]:
    """ResNets on CIFAR-100: two ranks are the paper's two micro-batches. About 200 epochs of 45,000 images."""
    noises = {"uniform": Labels("uniform", share=0.4), "human": Labels("human", column="fine")}
    return [
        Experiment(
            f"paper {model} {name}", "paper", f"CIFAR-100, {model}, W=2, batch 100, {name} label noise",
            Run(
                "cifar100", model, (0, 1), 100, 42_500, lr=0.01, labels=labels, weight_decay=1e-2,
                schedule="plateau", augment=True, evaluate_every=425, engine="ddp",
            ),
            ("averaging", "random members", "random skips", "neighborhood", "oracle"), tau=0.97,
        )
        for model in ("resnet18", "resnet34")
        for name, labels in noises.items()
    ]  # fmt: skip
