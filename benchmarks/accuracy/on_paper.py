"""The paper's data, CIFAR-100 whole and at 32x32, on a network that a CPU can train."""

from dataclasses import dataclass, replace

from benchmarks.accuracy.declare import Experiment, Labels, Run

HUMAN = Labels("human", column="fine")  # 40 % wrong


@dataclass(frozen=True)
class _Data:
    name: str
    told: str
    kept: int  # images, beside the validation part
    epochs: int
    evaluated: int  # epochs from one evaluation to the next
    augment: bool


WHOLE = _Data("cifar100", "50,000 images", 42_500, epochs=5, evaluated=1, augment=True)
TENTH = _Data("tenth of cifar100", "5,000 images, not augmented", 4_250, epochs=50, evaluated=5, augment=False)

SKIPS = ("averaging", "best lr", "sequential, best tau", "sequential: random skips")
FEW = ("averaging", "sequential, best tau")
SKIPPING = (*FEW, "sequential: random skips")
WITHOUT_CONTROLS = (*FEW, "consensus", "reference of 400")
ONE_BAD = (*WITHOUT_CONTROLS, "best lr", "consensus: random members", "mixing", "oracle")


def paper() -> list[Experiment]:
    """Return the paper's cases and controls, and one bad rank of four; it needs --data-dir.

    In each: data, W, images a rank and step, labels, arms, seeds.
    """
    cases = {
        "wrong label map on rank 0 of 4": (WHOLE, 4, 25, Labels("shift", (0,)), ONE_BAD, 3),
        "human labels, W=4, batch 25": (
            WHOLE, 4, 25, HUMAN, (*SKIPS, "consensus", "reference of 400", "oracle"), 3,
        ),
        "human labels for 50 epochs, W=2, batch 50": (TENTH, 2, 50, HUMAN, (*SKIPS, "oracle"), 3),
        "human labels on rank 0 of 4": (WHOLE, 4, 25, replace(HUMAN, ranks=(0,)), WITHOUT_CONTROLS, 3),
        "human labels, W=2, batch 50": (WHOLE, 2, 50, HUMAN, SKIPPING, 1),
        "human labels for 20 epochs, W=2, batch 10": (replace(TENTH, epochs=20), 2, 10, HUMAN, SKIPPING, 3),
        "right labels, W=2, batch 50": (WHOLE, 2, 50, Labels(), FEW, 1),
        "right labels, W=4, batch 25": (WHOLE, 4, 25, Labels(), WITHOUT_CONTROLS, 1),
        "human labels, W=8, batch 12": (WHOLE, 8, 12, HUMAN, (*FEW, "consensus"), 1),
    }  # fmt: skip
    experiments = [
        _experiment(name, data, _run(data, world, batch, labels), arms, seeds)
        for name, (data, world, batch, labels, arms, seeds) in cases.items()
    ]
    return [*experiments, _as_published()]


def _as_published() -> Experiment:
    """Return the paper's learning rate, weight decay and draws: a micro-batch has one image of each class.

    Left out: its larger networks, its many epochs, and its learning rate that falls when validation stops improving.
    """
    data = replace(WHOLE, epochs=10)
    run = replace(_run(data, 2, 100, HUMAN), lr=0.01, weight_decay=1e-2, balanced=True)
    name = "human labels, the paper's recipe, W=2, one image of each class"
    return _experiment(name, data, run, ("averaging", "best lr", "sequential, best tau"), 3, lrs=(0.01, 0.05, 0.1))


def _experiment(
    name: str, data: _Data, run: Run, arms: tuple[str, ...], seeds: int, lrs: tuple[float, ...] = (0.025, 0.05, 0.1)
) -> Experiment:
    title = f"CIFAR-100 ({data.told}), ResNet-8, {data.epochs} epochs, {name}"
    return Experiment(f"paper {name}", "paper", title, run, arms, bad=run.labels.ranks, lrs=lrs,
                      taus=(0.95, 1.0, 1.05), seeds=seeds, notes={"panel": name})  # fmt: skip


def _run(data: _Data, world: int, batch: int, labels: Labels) -> Run:
    epoch = data.kept // (world * batch)
    return Run(data.name, "resnet8", tuple(range(world)), batch, data.epochs * epoch, lr=0.05, labels=labels,
               evaluate_every=data.evaluated * epoch, augment=data.augment)  # fmt: skip
