"""The default filter with 64 to 1024 ranks, all of them in this process: who is left out, and what a verdict takes.

    python -m benchmarks.simulation --out benchmarks/results/simulation.md

Fake ranks train one small network on `gaf_ddp.demo.points`, each on draws of its own; bad ones have wrong labels. Their
gradients are folded, packed, unpacked, tallied and judged by the package's own code, so a verdict, its time on the host
and its memory are those of a job of so many ranks. Nothing is sent. How many steps go into a ballot is what a model of
--gradient bytes would have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.command_line import described, new_file, positive, size_in_bytes
from benchmarks.cost import steps_of_a_ballot
from benchmarks.fake_ranks import Filter, Network, Outcome
from benchmarks.measure import hardware
from gaf_ddp.demo import points

RANKS_PER_HOST, BATCH = 8, 8
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


def run(cell: Cell, steps: int, gradient: float) -> Outcome:
    """Train one job's fake ranks."""
    network, outcome = Network(), Outcome()
    inputs, labels = points(20_000, seed=1)
    bad = torch.zeros(cell.world, 1, dtype=torch.bool)
    bad[list(cell.bad)] = True
    random = torch.Generator().manual_seed(2)
    every = steps_of_a_ballot(cell.world, gradient)
    hosts = [rank // RANKS_PER_HOST if cell.hosts else rank for rank in range(cell.world)]
    filters = Filter(hosts, every)
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
{SETTLED} on. Tally and verdict: CPU time, medians, one thread; accelerators tally on the device. Held: all ballots,
momenta and inner products.

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
