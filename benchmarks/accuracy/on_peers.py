"""Digits beside the strongest rules of other packages, on the same draws."""

from dataclasses import replace

from benchmarks.accuracy.declare import Experiment, Labels
from benchmarks.accuracy.on_digits import digits_run
from benchmarks.accuracy.on_held_out import FIRST_SEED

ARMS = ("averaging", "best lr", "neighborhood", "consensus", "reference", "mixing", "clipping", "smea", "caf",
        "upgrad", "krum", "oracle")  # fmt: skip


def peers() -> list[Experiment]:
    """Return nobody bad, a bad minority of one and of three, a bad majority, and honest ranks that differ."""
    pairs = tuple((2 * r, 2 * r + 1) for r in range(5))
    told = {
        "nobody of 8 is bad": (8, 10, Labels()),
        "wrong label map on rank 0 of 8": (8, 10, Labels("shift", (0,))),
        "wrong label map on rank 0, 3, 6 of 8": (8, 10, Labels("shift", (0, 3, 6))),
        "wrong label map on rank 0, 2, 3, 5, 6 of 8": (8, 10, Labels("shift", (0, 2, 3, 5, 6))),
        "every rank has its own two classes": (5, 16, Labels("own classes", classes=pairs)),
    }
    return [
        Experiment(
            f"peers {name}", "peers", f"digits, W={world}, batch {batch}, {name}",
            replace(digits_run(world, batch, 400), labels=labels), ARMS,
            bad=labels.ranks, lrs=(0.025, 0.05, 0.1), seeds=3, first_seed=FIRST_SEED, notes={"panel": name},
        )
        for name, (world, batch, labels) in told.items()
    ]  # fmt: skip
