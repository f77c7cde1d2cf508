"""Gradients ballot by ballot, and the two that judge them: the rule with its memory, and the late way's judge."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gaf_ddp.ballots.judge import Judge, Opinion
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.rules.memory import MOMENTUM, ConsensusMemory, Judgement
from tests import oracle
from tests.properties import gramian_of


def voting(gradients: Tensor) -> Tensor:
    """Return who has a gradient that is finite and not zero, bool `(W,)`."""
    voters = torch.zeros(len(gradients), dtype=torch.bool)
    voters[oracle.present(list(gradients.double()), None)] = True
    return voters


class ByMemory:
    """W ranks whose momenta are at hand in float64, judged through their Gramians alone."""

    def __init__(self, world_size: int, size: int) -> None:
        self.momenta = torch.zeros(world_size, size, dtype=torch.float64)
        self.memory = ConsensusMemory()

    def step(self, gradients: Tensor, steps: int = 1) -> Judgement:
        """Judge the gradients `(W, n)` of a ballot, and move the momenta."""
        voters = voting(gradients)
        own = torch.where(voters[:, None], gradients.double(), 0)
        self.momenta = MOMENTUM**steps * self.momenta + own
        found = self.memory.judge(gramian_of(self.momenta), gramian_of(own), voters, steps)
        self.momenta = found.moves @ self.momenta
        return found


class ByJudge:
    """The late way's judge, whose momenta are in float32."""

    def __init__(self, world_size: int, ratio: float = 3.0) -> None:
        self.judge, self._voters = Judge(ratio, MOMENTUM), Voters(list(range(world_size)))

    def step(self, gradients: Tensor, steps: int = 1, shares: Tensor | None = None) -> Opinion:
        """Judge the gradients `(W, n)` of a ballot, which may have shares `(W, 2, n)` of held-out data's."""
        products = self.judge.tally(self._voters.mean(gradients.float()), steps, shares)
        return self.judge.judge(products, voting(gradients), steps)

    def kept(self, gradients: Tensor, rank: int) -> list[bool]:
        """Return after each of the steps `(S, W, n)` whether the rank counts in the next one."""
        return [bool(self.step(rows).kept[rank]) for rows in gradients]


def training(world_size: int, steps: int, common: float = 0.5, size: int = 40, seed: int = 0) -> Tensor:
    """Return gradients `(S, W, n)`: a direction that turns, of this strength, and the ranks' noise, of about 1."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.linspace(0, 3, steps)[:, None]
    plane = torch.nn.functional.normalize(torch.randn(2, size, generator=generator))
    direction = angle.cos() * plane[0] + angle.sin() * plane[1]
    noise = torch.randn(steps, world_size, size, generator=generator) / size**0.5
    gradients: Tensor = common * direction[:, None] + noise
    return gradients


def burst(gradients: Tensor, rank: int, factor: float) -> Tensor:
    """Multiply a rank's gradients in steps 20 to 49."""
    gradients[20:50, rank] *= factor
    return gradients


def _absent(gradients: Tensor, rank: int) -> Tensor:
    gradients[0, rank] = gradients[15:30, rank] = 0
    gradients[40:, rank - 1] = 0
    return gradients


def _none_here(gradients: Tensor, rank: int) -> Tensor:
    gradients[10, :] = 0
    gradients[11, :] = torch.nan
    gradients[30:32, rank:] = torch.nan
    return gradients


def _nearly_copies(gradients: Tensor, rank: int) -> Tensor:
    gradients = gradients[:, :1] + 1e-2 * gradients
    gradients[30:, rank] *= -1
    return gradients


def coming_and_going(gradients: Tensor, rank: int) -> Tensor:
    """Return the gradients with one in eight zero, one not finite, and one a thousand times as long."""
    generator = torch.Generator().manual_seed(rank)
    kind = torch.randint(8, gradients.shape[:2], generator=generator)[..., None]
    gradients = torch.where(kind == 0, 0, gradients)
    gradients = torch.where(kind == 1, torch.nan, gradients)
    return torch.where(kind == 2, 1000 * gradients, gradients)


SCENARIOS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": lambda g, rank: g,
    "x1000": lambda g, rank: burst(g, rank, 1000.0),
    "x-10": lambda g, rank: burst(g, rank, -10.0),
    "nan": lambda g, rank: burst(g, rank, math.nan),
    "inf": lambda g, rank: burst(g, rank, math.inf),
    "flipped": lambda g, rank: torch.cat([g[:5], torch.cat([g[5:, :rank], -g[5:, rank:]], 1)]),
    "absent": _absent,
    "none here": _none_here,
    "nearly copies": _nearly_copies,
    "coming and going": coming_and_going,
}
