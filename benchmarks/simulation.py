"""The default filter with 64 to 1024 ranks, all of them in this process: who is left out, and what a verdict takes.

    python -m benchmarks.simulation --out benchmarks/results/simulation.md

Fake ranks train one small network on `gaf_ddp.demo.points`, each on draws of its own; bad ones have wrong labels. Their
gradients are folded, packed, unpacked, tallied and judged by the package's own code, so a verdict, its time on the host
and its memory are those of a job of so many ranks. Nothing is sent. How many steps go into a ballot is what a model of
--gradient bytes would have.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.command_line import described, new_file, positive, size_in_bytes
from benchmarks.cost import SKETCH_SIZE, steps_of_a_ballot
from benchmarks.measure import hardware
from gaf_ddp import ConsensusAgreement
from gaf_ddp.ballots.ballot import Told, pack, read, unpack
from gaf_ddp.ballots.judge import Judge
from gaf_ddp.ballots.verdict import draw
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.demo import points
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.rules.memory import MOMENTUM

RANKS_PER_HOST, BATCH, BUCKETS = 8, 8, 1
SETTLED = 100  # the step from which on shares of kept ranks are counted


@dataclass(frozen=True)
class Cell:
    """One job: so many ranks, the bad ones, whether a host votes as one, whether there is a filter."""

    world: int
    bad: tuple[int, ...] = ()
    hosts: bool = False
    filters: bool = True

    @property
    def name(self) -> str:
        """In words."""
        voters = f"{self.world // RANKS_PER_HOST} hosts of {RANKS_PER_HOST}" if self.hosts else "ranks"
        return f"| {self.world} | {voters if self.filters else 'averaging'} | {len(self.bad)} |"


def spread_over(world: int, share: float) -> tuple[int, ...]:
    """Return ranks, evenly spread, that are such a share of all."""
    return tuple(range(0, world, round(1 / share)))


def cells(world_sizes: Sequence[int]) -> list[Cell]:
    """Return nobody bad, one bad rank, and a quarter of them; with the most ranks a vote for each host, too."""
    found = []
    for world in world_sizes:
        for bad in ((), (world // 2,), spread_over(world, 0.25)):
            found += [Cell(world, bad), *([Cell(world, bad, filters=False)] if len(bad) > 1 else [])]
    most = max(world_sizes)
    host = tuple(range(RANKS_PER_HOST, 2 * RANKS_PER_HOST))
    return [*found, Cell(most, host[:1], hosts=True), Cell(most, host, hosts=True)]


@dataclass
class Outcome:
    """What became of a job; seconds of each verdict on the host and of each tally, and bytes of what both hold."""

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
    """The late way of all fake ranks, without the sending."""

    def __init__(self, cell: Cell, every: int) -> None:
        hosts = [rank // RANKS_PER_HOST if cell.hosts else rank for rank in range(cell.world)]
        self._voters, self._every = Voters(hosts), every
        self._judge = Judge(ConsensusAgreement().ratio, MOMENTUM)
        self._limits = torch.full((cell.world, BUCKETS), torch.inf, dtype=torch.float64)
        self._kept = torch.ones(cell.world, dtype=torch.bool)
        self._sketches = torch.zeros(cell.world, SKETCH_SIZE)
        self._squares = torch.zeros(cell.world, BUCKETS, dtype=torch.float64)
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
        begun = time.perf_counter()
        sketches, numbers = unpack(rows, SKETCH_SIZE)
        products = self._judge.tally(self._voters.mean(sketches), self._steps)
        between = time.perf_counter()
        found = draw(
            self._judge, products, read(numbers, BUCKETS), self._voters, self._steps, 10.0, self._limits, counted
        )
        outcome.verdict.append(time.perf_counter() - between)
        outcome.tally.append(between - begun)
        outcome.held = rows.nbytes + 4 * self._voters.count * SKETCH_SIZE + products.nbytes
        self._kept, self._limits = found.kept, found.limits
        self._steps = 0
        self._sketches.zero_()
        self._squares.zero_()


def run(cell: Cell, steps: int, gradient: float) -> Outcome:
    """Train one job's fake ranks."""
    network, outcome = Network(), Outcome()
    inputs, labels = points(20_000, seed=1)
    bad = torch.zeros(cell.world, 1, dtype=torch.bool)
    bad[list(cell.bad)] = True
    random = torch.Generator().manual_seed(2)
    every = steps_of_a_ballot(cell.world, gradient)
    filters = Filter(cell, every)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (cell.world, BATCH), generator=random)
        answers = torch.where(bad, (labels[chosen] + 1) % 10, labels[chosen])
        gradients = network.gradients(inputs[chosen], answers)
        counted = filters.share(gradients, outcome) if cell.filters else torch.ones(cell.world, dtype=torch.bool)
        outcome.kept.append(counted)
        network.step(gradients[counted].mean(0))
    outcome.accuracy = network.accuracy(*points(5000, seed=3))
    return outcome


def row(cell: Cell, outcome: Outcome, gradient: float) -> str:
    """Return a line of the table."""
    kept, bad = torch.stack(outcome.kept).double(), torch.zeros(cell.world, dtype=torch.bool)
    bad[list(cell.bad)] = True
    late = kept[SETTLED:] if len(kept) > SETTLED else kept
    shares = [f"{100 * float(late[:, which].mean()):.0f} %" if which.any() else "" for which in (bad, ~bad)]
    all_out = (kept[:, bad].sum(1) == 0).nonzero().flatten().tolist() if cell.bad else []
    times = [f"{1000 * median(each):.1f}" if each else "" for each in (outcome.tally, outcome.verdict)]
    every = str(steps_of_a_ballot(cell.world, gradient)) if cell.filters else ""
    held = f"{outcome.held / 2**20:.1f}" if outcome.held else ""
    first = str(all_out[0]) if all_out and cell.filters else ""
    return (
        f"{cell.name} {every} | {shares[0]} | {shares[1]} | {first} | {outcome.accuracy:.1f} | "
        + " | ".join([*times, held])
        + " |"
    )


HEAD = """| W | who votes | bad ranks | steps of a ballot | bad kept | others kept | all bad out from step | \
accuracy, % | tally, ms | verdict, ms | held, MB |
|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


def page(rows: Sequence[str], steps: int, gradient: float) -> str:
    """Return the results as a page."""
    about = ", ".join(f"{name} {value}" for name, value in hardware(torch.device("cpu")).items())
    return f"""# Up to 1024 ranks, simulated

`python -m benchmarks.simulation --steps {steps}`, {about}.

{(__doc__ or "").split("benchmarks/results/simulation.md")[1].strip()}

{steps} steps, batches of {BATCH}, ballots as for a gradient of {gradient / 2**20:.0f} MB. Kept: mean over steps from
{SETTLED} on. Tally and verdict: medians, one thread; accelerators tally on the device. Held: all ballots, momenta and
inner products.

{HEAD}
""" + "".join(f"{each}\n" for each in rows)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Run the command line."""
    parser = described(__doc__)
    parser.add_argument("--world-sizes", type=positive, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--gradient", type=size_in_bytes, default=100 * 2**20, help="bytes, as in 100MB")
    parser.add_argument("--out", type=new_file, help="a Markdown file")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for cell in cells(given.world_sizes):
        rows.append(row(cell, run(cell, given.steps, given.gradient), given.gradient))
        say(rows[-1])
    if given.out:
        Path(given.out).write_text(page(rows, given.steps, given.gradient))


if __name__ == "__main__":
    main()
