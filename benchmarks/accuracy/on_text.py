"""Experiments on text: a character transformer, which is no classifier of images and learns by Adam."""

from benchmarks.accuracy.declare import Experiment, Labels, Run
from benchmarks.accuracy.images import BY_DIFFICULTY

ARMS = ("averaging", "best lr", "neighborhood", "consensus", "consensus: random members", "oracle")


def text() -> list[Experiment]:
    """Return four ranks that learn text: all alike, one with wrong targets, with its own register, or slower."""
    own = Labels("own classes", classes=((0,), (0,), (0,), (1,)))
    slow = Labels("own classes", classes=((1,), (0, 1), (0, 1), (0, 1)))
    settings = {
        "all ranks alike": ("documentation", Labels()),
        "shuffled targets on rank 0 of 4": ("documentation", Labels("shuffled", (0,))),
        "wrong letters on rank 0 of 4": ("documentation", Labels("shift", (0,))),
        "rank 3 of 4 alone has the other register": ("two registers", own),
        "rank 0 of 4 sees the hardest quarter only": (BY_DIFFICULTY, slow),
    }
    return [
        Experiment(
            f"text {name}",
            "text",
            f"character transformer, W=4, batch 4, {name}",
            Run(data, "transformer", (0, 1, 2, 3), 4, 600, 1e-2, labels=labels, weight_decay=0.0,
                evaluate_every=60, optimizer="adam"),
            ARMS,
            tau=0.9,
            bad=labels.ranks,
            lrs=(5e-3, 1e-2, 2e-2),
            seeds=2 if labels is own else 3,
            real_arms=("averaging", "consensus") if labels.kind == "shuffled" else (),
            real_seeds=3,
            notes={"panel": name},
        )
        for name, (data, labels) in settings.items()
    ]  # fmt: skip
