"""The gradient noise scale: of gradients whose covariance is known, on both ways; saved; and where it is not known."""

import math

import pytest
import torch
from torch import Tensor

from gaf_ddp import Mean, gram
from gaf_ddp.ballots.ballot import Numbers
from gaf_ddp.ballots.judge import Judge
from gaf_ddp.ballots.verdict import draw
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.monitor.noise import NoiseScale
from gaf_ddp.rules.agreement import Agreement, decide
from gaf_ddp.rules.memory import MOMENTUM
from tests.marks import job_but

N = 256


def gradients(world_size: int, steps: int, scale: float) -> Tensor:
    """Return gradients `(steps, W, N)` of a common direction of length 1, and noise with tr Σ = scale."""
    random = torch.Generator().manual_seed(world_size)
    common = torch.nn.functional.normalize(torch.randn(N, generator=random), dim=0)
    spread = torch.rand(N, generator=random).add(0.1)  # each direction has a variance of its own
    spread = spread * (scale / spread.square().sum()).sqrt()
    found: Tensor = common + spread * torch.randn(steps, world_size, N, generator=random)
    return found


class Late:
    """Decisions one step late, on ballots of so many steps."""

    def __init__(self, voters: Voters, steps: int = 1) -> None:
        self.judge, self.voters, self.steps = Judge(3.0, MOMENTUM), voters, steps

    def __call__(self, rows: Tensor) -> Agreement:
        """Return the record of gradients `(steps, W, N)`."""
        world_size = rows.shape[1]
        none = torch.zeros(world_size, 2, dtype=torch.float64)
        squares = rows.double().square().sum((0, 2))[:, None]
        flag = none[:, 0]
        numbers = Numbers(squares, flag, none, flag, flag, flag, none, squares[:, 0], flag)
        products = self.judge.tally(self.voters.mean(rows.sum(0)), self.steps)
        limits = torch.full((world_size, 1), math.inf, dtype=torch.float64)
        everyone = torch.ones(world_size, dtype=torch.bool)
        return draw(self.judge, products, numbers, self.voters, self.steps, 10.0, limits, everyone).agreement


def at_once(rows: Tensor) -> Agreement:
    """Return the record of a decision at once."""
    return decide(gram(rows[0]), Mean(), 10.0)


CASES = [(way, world_size, scale) for way in ("late", "at once") for world_size in (2, 4, 8) for scale in (2.0, 20.0)]


@pytest.mark.parametrize(
    ("way", "world_size", "scale"), job_but(("late", 4, 2.0), ("at once", 8, 20.0), of=CASES), ids=str
)
def test_it_is_that_of_a_known_covariance(way: str, world_size: int, scale: float) -> None:
    decisions = Late(Voters(list(range(world_size)))) if way == "late" else at_once
    found, noise = [], NoiseScale()
    for step, rows in enumerate(gradients(world_size, 500 if scale < 10 or world_size > 2 else 2000, scale)):
        noise.add(step, [decisions(rows[None])])
        found.append(noise.value)
    # The mean of a hundred steps has an error of its own: it goes over the later ones.
    assert sum(found[100:]) / len(found[100:]) == pytest.approx(scale, rel=0.1)


@pytest.mark.job
def test_voters_of_several_ranks_and_ballots_of_several_steps_have_the_same_unit() -> None:
    hosts, late = NoiseScale(), Late(Voters([0, 0, 1, 1, 2, 2, 3, 3]))
    several, ballots = NoiseScale(), Late(Voters([0, 1, 2, 3]), steps=4)
    of_hosts, of_steps = [], []
    for step, rows in enumerate(gradients(8, 600, 4.0)):
        hosts.add(step, [late(rows[None])], late.voters.of_ranks)
        of_hosts.append(hosts.value)
    for step, steps in enumerate(gradients(4, 2400, 4.0).view(600, 4, 4, N)):
        several.add(4 * step, [ballots(steps)], steps=4)
        of_steps.append(several.value)
    for found in (of_hosts, of_steps):
        assert sum(found[100:]) / len(found[100:]) == pytest.approx(4.0, rel=0.1)


def test_nothing_is_known_of_one_rank_nor_of_noise_alone_and_it_can_be_saved() -> None:
    noise = NoiseScale()
    assert math.isnan(noise.value)
    noise.add(0, [at_once(torch.randn(1, 1, N))])
    assert math.isnan(noise.value)
    broken = torch.randn(1, 3, N)
    broken[0, 1] = math.nan
    noise.add(1, [at_once(broken), at_once(gradients(3, 1, 1.0))])
    again = NoiseScale()
    again.load(noise.read())
    assert again.read() == noise.read()
    with pytest.raises(ValueError, match="noise must hold lists of finite numbers"):
        again.load({"noise": [math.nan], "signal": [0.0], "last": [0.0]})
