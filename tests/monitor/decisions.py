"""Decisions for tests of what is told of them: made to order, and at random."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from gaf_ddp import Agreement, GAFState, Mean, NeighborhoodAgreement
from gaf_ddp.monitor.history import History
from gaf_ddp.monitor.records import Decision
from gaf_ddp.monitor.report import Report
from gaf_ddp.monitor.totals import Totals
from gaf_ddp.rules.agreement import decide

Steps = dict[int, list[Agreement]]


def decided(gramian: torch.Tensor, tau: float = 0.5, ratio: float | None = None) -> Agreement:
    return decide(gramian, NeighborhoodAgreement(tau), ratio)


def some_decisions() -> list[Agreement]:
    """Return three decisions of four ranks: all kept, one left out of each kind, nothing agreed."""
    spoilt = torch.ones(4, 4)
    spoilt[0, 0], spoilt[1, 1], spoilt[2, 2] = math.nan, 0.0, 1.0
    apart = torch.tensor([[1.0, -0.5, 0, 0], [-0.5, 1, 0, 0], [0, 0, 1e6, 0], [0, 0, 0, 0]])
    return [decided(gramian, ratio=10.0) for gramian in (torch.ones(4, 4), spoilt, apart)]


def made(kept: Sequence[bool], z: Sequence[float] | None = None, **flags: Sequence[bool]) -> Agreement:
    """Return a record of ranks of which those that are kept are alike; flags are its other fields."""
    size, who = len(kept), torch.tensor(kept)
    plain = decide((who[:, None] & who[None, :]).float() + torch.diag((~who).float()), Mean(), None)
    found = {"kept": kept, "voters": kept, **{name: [False] * size for name in ("nonfinite", "overlong")}, **flags}
    fields = {name: torch.tensor(flag) for name, flag in found.items()}
    if z is not None:
        fields["distance"] = torch.tensor(z, dtype=torch.float64)
    return replace(plain, **fields, agreed=torch.tensor(any(kept)))


def random_steps(world_size: int, count: int, seed: int) -> Steps:
    """Return steps' decisions: streaks, gaps between steps, one to three in each, of every kind a rank can be."""
    dice = random.Random(seed)
    sides, steps, step = [True] * world_size, {}, 3
    for _ in range(count):
        step += 1 if dice.random() < 0.95 else 5
        sides = [side != (dice.random() < 0.02) for side in sides]
        done = [dice.random() < 0.02 for _ in sides]
        nothing = dice.random() < 0.05  # agreed
        steps[step] = [_random_decision(dice, sides, done, nothing, step) for _ in range(dice.choice([1, 3, 3, 3]))]
    return steps


def _random_decision(
    dice: random.Random, sides: Sequence[bool], done: Sequence[bool], nothing: bool, step: int
) -> Agreement:
    kept = [not nothing and not d and side == (dice.random() < 0.9) for side, d in zip(sides, done, strict=True)]
    fates = [dice.choice(["zero", "nonfinite", "overlong", "voters"]) for _ in kept]

    def are(fate: str) -> list[bool]:
        return [f == fate and not k and not d for f, k, d in zip(fates, kept, done, strict=True)]

    voters = [k or v for k, v in zip(kept, are("voters"), strict=True)]
    z = [dice.choice([math.nan, 1.0, 1e20, math.inf, 0.5 + step / 100]) for _ in kept]
    flags = {"voters": voters, "nonfinite": are("nonfinite"), "overlong": are("overlong")}
    if dice.random() < 0.9:
        flags |= {"flipped": [dice.random() < 0.1 for _ in kept], "finished": list(done)}
        return made(kept, z, **flags)
    if any(done):
        flags["finished"] = list(done)
    return made(kept, **flags)


def end_step(state: GAFState, *decisions: Agreement) -> None:
    """End a step of the state with these decisions, as tau and weighting do."""
    numbers = [torch.zeros(len(each.kept)) for each in decisions]
    step = state.step
    state._end_step()
    state._records.add(step, [Decision(each, []) for each in decisions], numbers, state.max_consecutive_skips)


class Standing:
    """A history and the sums that its report needs."""

    def __init__(self) -> None:
        self.history, self.totals = History(), Totals()

    def add(self, step: int, decisions: list[Agreement]) -> None:
        self.history.add(step, decisions)
        self.totals.add(decisions)

    def report(self, step: int, hosts: list[str]) -> Report:
        return self.history.report(step, hosts, self.totals.read())
