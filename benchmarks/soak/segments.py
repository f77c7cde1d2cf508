"""What a soak goes through: stretches of steps, each with another model and other mishaps, from one seed."""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaf_ddp import ConsensusAgreement, Mean, SequentialAgreement

WORLD_SIZE = 4


def schedule(step: int) -> float:
    """Return tau, from strict to loose and back."""
    return 0.5 + (step // 7) % 5 * 0.3


# Settings of the states, which live as long as the soak.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"judge_every": 3, "check_every": 2},
    {"sketch_size": 256, "max_norm_ratio": 2.0},
    {"watch": True, "check_every": 3},
    {"voters": "host"},
    {"wire_dtype": torch.bfloat16, "sketch_size": 1024, "momentum": 0.9},
    {"tau": schedule, "exchange": "sharded"},
    {"tau": schedule, "scope": "model", "wire_dtype": torch.bfloat16},
    {"tau": 1.2, "exchange": "gather", "check_every": 5},
    {"tau": 1.0, "start_step": 9, "scope": "model"},
    {"weighting": ConsensusAgreement(2.0), "start_step": 9},
    {"weighting": SequentialAgreement(1.0), "exchange": "gather", "scope": "model"},
    {"weighting": Mean(), "exchange": "sketch", "max_norm_ratio": None},
]


class Segment(NamedTuple):
    """A stretch of steps, the same on every rank.

    Attributes:
        setting: which of SETTINGS.
        sizes: of the parameters.
        cap: bucket_cap_mb.
        steps: how many; in a `Join` the last ranks have fewer.
        kinds: by step and rank, what a gradient is; see `spoilt`.
        local: in which steps gradients are only accumulated.
        used: which parameters each rank uses, by step; everything is used where `unused` is false.
        unused: find_unused_parameters.
        joins: uneven inputs, under `Join`.
        restarts_at: the step before which model, optimizer and state are saved, made anew and loaded; −1 for none.
    """

    setting: int
    sizes: list[int]
    cap: float
    steps: int
    kinds: list[list[str]]
    local: list[bool]
    used: list[list[list[bool]]]
    unused: bool
    joins: bool
    restarts_at: int


def draw(seed: int, number: int, longest: int = 60) -> Segment:
    """Return the segment of that number, of so many steps at most."""
    chance = random.Random(f"{seed} {number}")
    sizes = [chance.choice([1, 3, 17, 64, 300, 1000]) for _ in range(chance.randint(1, 6))]
    steps, joins, unused = chance.randint(longest // 3, longest), chance.random() < 0.15, chance.random() < 0.25
    odd, rate = ["nan", "inf", "zero", "flipped", "huge", "tiny", "noise"], chance.choice([0.0, 0.02, 0.2])
    kinds = [
        [chance.choice(odd) if chance.random() < rate else "plain" for _ in range(WORLD_SIZE)] for _ in range(steps)
    ]
    first, rank, kind = chance.randrange(steps), chance.randrange(WORLD_SIZE), chance.choice(odd)
    for step in range(first, min(first + chance.choice([0, 5, 20]), steps)):  # a burst
        kinds[step][rank] = kind
    local = [not joins and chance.random() < 0.1 for _ in range(steps)]
    used = [[[chance.random() < 0.7 for _ in sizes] for _ in range(WORLD_SIZE)] for _ in range(steps)]
    restarts_at = chance.randrange(steps) if chance.random() < 0.3 and not joins else -1
    unused = unused and not joins
    setting = number % len(SETTINGS) if number < len(SETTINGS) else chance.randrange(len(SETTINGS))
    cap = chance.choice([0.0005, 0.002, 25.0])
    return Segment(setting, sizes, cap, steps, kinds, local, used, unused, joins, restarts_at)


def spoilt(gradient: Tensor, kind: str) -> Tensor:
    """Return a gradient `(N,)` as a rank of that kind has it; changes it."""
    if kind in ("nan", "inf"):
        gradient[len(gradient) // 2] = float(kind)
    factors = {"zero": 0.0, "flipped": -1.0, "huge": 1e12, "tiny": 1e-25}
    return torch.randn_like(gradient) if kind == "noise" else gradient.mul_(factors.get(kind, 1.0))


class Given(nn.Module):
    """Parameters whose gradients are given; some may stay unused."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.ones(size)) for size in sizes)

    def forward(self, gradients: Tensor, used: list[bool]) -> Tensor:
        """Return a loss with these gradients."""
        slices = torch.split(gradients, [len(part) for part in self.parts])
        losses = [(part * g).sum() for part, g, use in zip(self.parts, slices, used, strict=True) if use]
        return torch.stack(losses).sum() if losses else self.parts[0].sum() * 0
