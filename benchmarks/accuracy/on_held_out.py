"""Experiments with held-out data (`GAFState.reference`), on seeds that nothing was tuned on."""

from dataclasses import replace

from benchmarks.accuracy.arms import CARELESS
from benchmarks.accuracy.declare import Experiment, Fault, Labels, Run
from benchmarks.accuracy.on_digits import digits_run

FIRST_SEED = 18  # the rule's constants were chosen on seeds 0 to 17 of digits and 0 to 5 of small CIFAR
ARMS = ("averaging", "best lr", "consensus", "reference", "reference: random members", "oracle")
EIGHT_CLASSES = tuple(range(8))
ONE_ALONE = Labels("own classes", classes=(EIGHT_CLASSES, EIGHT_CLASSES, EIGHT_CLASSES, (8, 9)))

SHORT = {  # for pictures
    "wrong label map on rank 0 of 4": "1 of 4 wrong",
    "wrong label map on rank 0, 1, 2 of 4": "3 of 4 wrong",
    "one rank alone has classes 8 and 9": "own classes",
    "nobody of 4 is bad": "none bad",
    "one rank alone has four superclasses": "own superclasses",
    "rank 3 of 4 alone has the other register": "own register",
    "wrong letters on rank 0 of 4": "1 of 4 wrong",
}


def held_out() -> list[Experiment]:
    """Return honest minorities, bad minorities and majorities, attacks, and nobody bad."""
    return [*_digits(), *_for_long(), *_cifar(), *_superclasses(), *_text()]


def _digits() -> list[Experiment]:
    pairs = tuple((2 * r, 2 * r + 1) for r in range(5))
    told = {
        "one rank alone has classes 8 and 9": (4, 20, ONE_ALONE, None),
        "every rank has its own two classes": (5, 16, Labels("own classes", classes=pairs), None),
        "wrong label map on rank 0 of 4": (4, 20, Labels("shift", (0,)), None),
        "wrong label map on rank 0, 2 of 4": (4, 20, Labels("shift", (0, 2)), None),
        "wrong label map on rank 0, 1, 2 of 4": (4, 20, Labels("shift", (0, 1, 2)), None),
        "wrong label map on rank 0, 3, 6 of 8": (8, 10, Labels("shift", (0, 3, 6)), None),
        "wrong label map on rank 0, 2, 3, 5, 6 of 8": (8, 10, Labels("shift", (0, 2, 3, 5, 6)), None),
        "inner products by rank 0, 3, 6 of 8": (8, 10, Labels(), Fault("InnerProductManipulation", 0, (3, 6))),
        "copies by rank 0, 3, 6 of 8": (8, 10, Labels(), Fault("Mimic", 0, (3, 6))),
        "nobody of 4 is bad": (4, 20, Labels(), None),
        "nobody of 8 is bad": (8, 10, Labels(), None),
    }
    careless = ("one rank alone has classes 8 and 9", "wrong label map on rank 0, 1, 2 of 4", "nobody of 8 is bad")
    real = ("one rank alone has classes 8 and 9", "wrong label map on rank 0, 1, 2 of 4",
            "wrong label map on rank 0 of 4")  # fmt: skip
    return [
        Experiment(
            f"held out {name}", "held_out", f"digits, W={world}, batch {batch}, {name}",
            replace(digits_run(world, batch, 400), labels=labels, fault=fault),
            (*ARMS, *CARELESS) if name in careless else ARMS,
            bad=labels.ranks or (fault.all_ranks if fault else ()),
            lrs=(0.025, 0.05, 0.1), seeds=5, first_seed=FIRST_SEED,
            real_arms=("consensus", "reference") if name in real else (), real_seeds=3, notes={"panel": name},
        )
        for name, (world, batch, labels, fault) in told.items()
    ]  # fmt: skip


def _for_long() -> list[Experiment]:
    told = {
        "one rank alone has classes 8 and 9": ONE_ALONE,
        "wrong label map on rank 0 of 4": Labels("shift", (0,)),
        "wrong label map on rank 0, 1, 2 of 4": Labels("shift", (0, 1, 2)),
    }
    return [
        Experiment(
            f"held out {name}, 2000 steps", "held_out", f"digits, W=4, batch 20, 2000 steps, {name}",
            replace(digits_run(4, 20, 2000), labels=labels, evaluate_every=100),
            ("averaging", "consensus", "reference", "oracle"),
            bad=labels.ranks, seeds=3, first_seed=FIRST_SEED, notes={"panel": f"{SHORT[name]}, 2000 steps"},
        )
        for name, labels in told.items()
    ]  # fmt: skip


def _cifar() -> list[Experiment]:
    told = {
        "wrong label map on rank 0 of 4": (Labels("shift", (0,)), (400, 1000)),
        "one rank alone has classes 8 and 9": (ONE_ALONE, (400, 1000)),
        "wrong label map on rank 0, 1, 2 of 4": (Labels("shift", (0, 1, 2)), (400,)),
        "nobody of 4 is bad": (Labels(), (400,)),
    }
    return [
        Experiment(
            f"held out cifar {name}, {steps} steps", "held_out",
            f"CIFAR-10 (16x16, 2500 images), W=4, batch 16, {steps} steps, {name}",
            Run("small cifar10", "conv", (0, 1, 2, 3), 16, steps, lr=0.05, evaluate_every=25, labels=labels),
            ("averaging", "consensus", "reference", "oracle"),
            bad=labels.ranks, seeds=3, first_seed=FIRST_SEED, notes={"panel": f"CIFAR, {SHORT[name]}, {steps} steps"},
        )
        for name, (labels, all_steps) in told.items()
        for steps in all_steps
    ]  # fmt: skip


def _superclasses() -> list[Experiment]:
    common, alone = tuple(range(16)), (16, 17, 18, 19)
    told = {
        "one rank alone has four superclasses": Labels("own classes", classes=(common, common, common, alone)),
        "wrong label map on rank 0 of 4": Labels("shift", (0,)),
    }
    return [
        Experiment(
            f"held out cifar100 {name}", "held_out",
            f"CIFAR-100's 20 superclasses (16x16, 2500 images), W=4, batch 16, {name}",
            Run("small cifar100", "conv", (0, 1, 2, 3), 16, 600, lr=0.05, evaluate_every=25, labels=labels),
            ("averaging", "consensus", "reference", "oracle"),
            bad=labels.ranks, seeds=3, first_seed=FIRST_SEED, notes={"panel": f"CIFAR-100, {SHORT[name]}"},
        )
        for name, labels in told.items()
    ]  # fmt: skip


def _text() -> list[Experiment]:
    own = Labels("own classes", classes=((0,), (0,), (0,), (1,)))
    return [
        Experiment(
            f"held out text {name}", "held_out", f"character transformer, W=4, batch 4, {name}",
            Run(data, "transformer", (0, 1, 2, 3), 4, 600, 1e-2, labels=labels, weight_decay=0.0, evaluate_every=60,
                optimizer="adam"),
            ("averaging", "consensus", "reference", "oracle"),
            bad=labels.ranks, seeds=2, first_seed=FIRST_SEED, notes={"panel": f"text, {SHORT[name]}"},
        )
        for name, data, labels in (
            ("rank 3 of 4 alone has the other register", "two registers", own),
            ("wrong letters on rank 0 of 4", "documentation", Labels("shift", (0,))),
        )
    ]  # fmt: skip
