"""The declared experiments. `EXPERIMENTS` is the table; `GROUPS` says what each group of them asks."""

from dataclasses import replace

from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.on_digits import broken, classes, shift, tau, uniform
from benchmarks.accuracy.on_images import candidates, human, paper

GROUPS: dict[str, str] = {
    "shift": "Some ranks have every label wrong (y + 1): does the filter find them?",
    "broken": "One rank of eight sends a broken gradient: is it left out?",
    "uniform": "Every rank has the same share of random labels (the paper's case): is it more than fewer updates?",
    "tau": "How many steps does a tau skip, by W and batch size?",
    "candidates": "Can another rule beat its random controls under uniform label noise?",
    "classes": "Every label is right, but ranks see different classes: does the filter hurt honest minorities?",
    "human": "Human label noise (CIFAR-10N), on every rank and on one rank",
    "paper": "The paper's recipe, for machines that have CIFAR-100 (not run here)",
}

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for declare in (shift, broken, uniform, tau, candidates, classes, human, paper)
    for experiment in declare()
}


def quick(experiment: Experiment) -> Experiment:
    """The same experiment, too short to mean anything: twenty steps of one seed."""
    return replace(
        experiment,
        base=replace(experiment.base, steps=20, evaluate_every=10),
        seeds=1,
        lrs=experiment.lrs[:1],
        real_seeds=min(experiment.real_seeds, 1),
    )
