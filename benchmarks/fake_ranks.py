"""Ranks that are rows of a matrix in one process: their gradients, and the late way without the sending."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.cost import SKETCH_SIZE
from gaf_ddp import ConsensusAgreement
from gaf_ddp.ballots.ballot import Told, pack, read, unpack
from gaf_ddp.ballots.judge import Judge
from gaf_ddp.ballots.verdict import draw
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.rules.memory import MOMENTUM

BUCKETS = 1


@dataclass
class Outcome:
    """What became of a job; CPU seconds of each verdict on the host and of each tally, and bytes of what both hold."""

    accuracy: float = 0.0
    kept: list[Tensor] = field(default_factory=list)  # bool (W,), of each step
    tally: list[float] = field(default_factory=list)
    verdict: list[float] = field(default_factory=list)
    held: int = 0


class Network:
    """Two layers, one copy of their parameters for all fake ranks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        self.parameters = {name: each.detach() for name, each in self.module.named_parameters()}

    def gradients(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return every rank's gradient `(W, N)`, of its own batch, (W, batch, 32) and (W, batch)."""

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(functional_call(self.module, parameters, x), y)

        found = vmap(grad(loss), in_dims=(None, 0, 0))(self.parameters, inputs, labels)
        return torch.cat([each.flatten(1) for each in found.values()], 1)

    def step(self, gradient: Tensor, lr: float = 0.1) -> None:
        """Go down a gradient `(N,)`."""
        parts = gradient.split([each.numel() for each in self.parameters.values()])
        for each, part in zip(self.parameters.values(), parts, strict=True):
            each -= lr * part.view_as(each)

    def accuracy(self, inputs: Tensor, labels: Tensor) -> float:
        """Return the share of right answers in %."""
        answers = functional_call(self.module, self.parameters, inputs).argmax(1)
        return 100 * float((answers == labels).double().mean())


class Filter:
    """The late way of all fake ranks, without the sending.

    Args:
        of_ranks: each rank's voter.
        every: steps of a ballot.
    """

    def __init__(self, of_ranks: list[int], every: int) -> None:
        world = len(of_ranks)
        self._voters, self._every = Voters(of_ranks), every
        self._judge = Judge(ConsensusAgreement().ratio, MOMENTUM)
        self._limits = torch.full((world, BUCKETS), torch.inf, dtype=torch.float64)
        self._kept = torch.ones(world, dtype=torch.bool)
        self._sketches = torch.zeros(world, SKETCH_SIZE)
        self._squares = torch.zeros(world, BUCKETS, dtype=torch.float64)
        self._steps = 0

    def share(self, gradients: Tensor, outcome: Outcome) -> Tensor:
        """Fold a step's gradients `(W, N)`; return who counts in it, bool `(W,)`, by the last verdict."""
        counted, spans = self._kept, whole(gradients.shape[1])
        for rank, each in enumerate(gradients):
            sketch, square = fold(each, spans, SKETCH_SIZE)
            self._sketches[rank] += sketch
            self._squares[rank] += square
        self._steps += 1
        if self._steps == self._every:
            self._count(counted, outcome)
        return counted

    def _count(self, counted: Tensor, outcome: Outcome) -> None:
        told = Told(False, [0.0], None, None, 0, None)
        rows = torch.stack(
            [pack(s, q, q.sum(), None, told) for s, q in zip(self._sketches, self._squares, strict=True)]
        )
        begun = time.process_time()
        sketches, numbers = unpack(rows, SKETCH_SIZE)
        products = self._judge.tally(self._voters.mean(sketches), self._steps)
        between = time.process_time()
        found = draw(
            self._judge, products, read(numbers, BUCKETS), self._voters, self._steps, 10.0, self._limits, counted
        )
        outcome.verdict.append(time.process_time() - between)
        outcome.tally.append(between - begun)
        outcome.held = rows.nbytes + 4 * self._voters.count * SKETCH_SIZE + products.nbytes
        self._kept, self._limits = found.kept, found.limits
        self._steps = 0
        self._sketches.zero_()
        self._squares.zero_()
