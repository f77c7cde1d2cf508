"""The paper's data, CIFAR-100 whole and at 32x32, on a network that a CPU can train."""

from dataclasses import replace

from benchmarks.accuracy.declare import Experiment, Labels, Run

HUMAN = Labels("human", column="fine")  # 40 % wrong
EPOCHS, KEPT = 6, 42_500  # training images beside the validation part


def paper() -> list[Experiment]:
    """Return human and clean labels over W and batch, and one bad rank of four; it needs --data-dir."""
    arms = ("averaging", "best lr", "random skips", "neighborhood", "sequential, best tau", "sequential: random skips",
            "consensus", "reference", "oracle")  # fmt: skip
    few = ("averaging", "neighborhood", "sequential, best tau", "consensus")
    told = {
        "human labels, W=2, batch 50": (2, 50, HUMAN, arms),
        "human labels, W=4, batch 25": (4, 25, HUMAN, arms),
        "human labels, W=8, batch 12": (8, 12, HUMAN, few),
        "human labels, W=2, batch 10": (2, 10, HUMAN, few),
        "right labels, W=2, batch 50": (2, 50, Labels(), few),
        "right labels, W=4, batch 25": (4, 25, Labels(), (*few, "reference")),
        "wrong label map on rank 0 of 4": (4, 25, Labels("shift", (0,)), (*few, "reference", "oracle")),
        "human labels on rank 0 of 4": (4, 25, replace(HUMAN, ranks=(0,)), (*few, "reference", "oracle")),
    }
    return [
        Experiment(
            f"paper {name}", "paper", f"CIFAR-100 (32x32, 50,000 images), ResNet-8, {EPOCHS} epochs, {name}",
            _run(world, batch, labels), own, tau=0.95, bad=labels.ranks, lrs=(0.02, 0.05, 0.1),
            seeds=3 if own == arms or labels.ranks else 1, notes={"panel": name},
        )
        for name, (world, batch, labels, own) in told.items()
    ]  # fmt: skip


def _run(world: int, batch: int, labels: Labels) -> Run:
    epoch = KEPT // (world * batch)
    return Run("cifar100", "resnet8", tuple(range(world)), batch, EPOCHS * epoch, lr=0.05, labels=labels,
               evaluate_every=epoch, augment=True)  # fmt: skip
