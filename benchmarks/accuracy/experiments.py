"""The declared experiments. `EXPERIMENTS` is the table; `GROUPS` says what each group of them asks."""

from dataclasses import replace

from benchmarks.accuracy.arms import ALL, CONSENSUS_ARMS, beside_landed
from benchmarks.accuracy.declare import Experiment, Labels, Run
from benchmarks.accuracy.on_digits import attack, broken, byzfl, classes, shift, tau, uniform
from benchmarks.accuracy.on_held_out import held_out
from benchmarks.accuracy.on_paper import paper
from benchmarks.accuracy.on_peers import peers
from benchmarks.accuracy.on_text import text


def human() -> list[Experiment]:
    """Return a small CIFAR-10 with CIFAR-10N's and other wrong labels, and without; it needs --data-dir."""
    few = ("averaging", "best lr", "random members", "random skips", "neighborhood",
           *CONSENSUS_ARMS, "sequential", "oracle")  # fmt: skip
    base = Run("small cifar10", "conv", (0, 1, 2, 3), 16, 400, lr=0.05, evaluate_every=25)
    least = ("averaging", "best lr", "neighborhood", "consensus", "consensus: random members", "oracle")
    settings = {
        "`worse` labels everywhere": (4, Labels("human", column="worse"), ALL),
        "`aggregate` labels everywhere": (4, Labels("human", column="aggregate"), few),
        "`worse` labels on rank 0 of 4": (4, Labels("human", (0,), column="worse"), ALL),
        "wrong label map on rank 0 of 4": (4, Labels("shift", (0,)), few),
        "right labels on 4 ranks": (4, Labels(), least),
        "wrong label map on rank 0, 3, 6 of 8": (8, Labels("shift", (0, 3, 6)), least),
        "right labels on 8 ranks": (8, Labels(), ("averaging", "consensus")),
    }
    return [
        Experiment(
            f"human {name.replace('`', '')}",
            "human",
            f"CIFAR-10 (16x16, 2500 images), W={world}, batch 16, {name}",
            replace(base, ranks=tuple(range(world)), labels=labels),
            arms,
            tau=0.9,
            bad=labels.ranks,
            lrs=(0.02, 0.05),
            seeds=3,
            real_arms=("averaging", "consensus") if labels.kind == "shift" else (),
            real_seeds=3,
            notes={"panel": name.replace("`", "")},
        )
        for name, (world, labels, arms) in settings.items()
    ]


GROUPS: dict[str, str] = {
    "shift": "Some ranks have every label wrong (y + 1): does the filter find them?",
    "broken": "One rank of eight sends a broken gradient: is it left out?",
    "uniform": "Every rank has the same share of random labels (the paper's case): is it more than fewer updates?",
    "tau": "How many steps does a tau skip, by W and batch size?",
    "classes": "Every label is right, but ranks see different classes: does the filter hurt honest minorities?",
    "human": "A harder task, small CIFAR-10: human label noise (CIFAR-10N) and wrong label maps",
    "text": "Another kind of network: a character transformer with one bad rank, or an honest one that differs",
    "attack": "Attackers who know the rule and stay just within its reach: what do they cost?",
    "byzfl": "ByzFL's own attacks: are they left out?",
    "paper": "The paper's own data: CIFAR-100, with the labels of CIFAR-100N and with right ones",
    "peers": "Beside other packages' strongest rules, which are told how many ranks are bad",
    "held_out": "A few held-out examples as a witness: honest minorities, bad majorities, and what careless use does",
}


def _with_landed(e: Experiment) -> Experiment:
    return replace(e, arms=beside_landed(e.arms), real_arms=beside_landed(e.real_arms))


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: _with_landed(experiment)
    for declare in (shift, broken, uniform, tau, classes, human, text, attack, byzfl)
    for experiment in declare()
} | {experiment.name: experiment for experiment in (*held_out(), *paper(), *peers())}


def quick(experiment: Experiment) -> Experiment:
    """Return the same experiment, too short to mean anything: twenty steps of one seed."""
    base = replace(experiment.base, steps=20, evaluate_every=10)
    real_seeds = min(experiment.real_seeds, 1)
    return replace(experiment, base=base, seeds=1, lrs=experiment.lrs[:1], real_seeds=real_seeds)
