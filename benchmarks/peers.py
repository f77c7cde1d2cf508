"""What a step's average costs beside other packages' robust rules: the same gradients, the same run, one thread.

    python -m benchmarks.peers --ranks 8 --numbers 11200000

`ms` is the median of the repeats, `mean` the same relative to torch's mean of all rows. Others' rules take the rows
`(W, n)` in one place: of every rank's bytes, W arrive at each place that computes it. The filter's rows are what one
rank computes: one step late it is on its own gradient, and averages with an all-reduce; at once it is on a W-th of all
gradients. `received` is in gradients, of a rank that ends up with the average: 2 (W - 1) / W of a ring all-reduce,
W - 1 where every rank gathers all. Others are told f bad ranks, --bad. Accuracy: `python -m benchmarks.accuracy
--experiments peers`.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from benchmarks.command_line import described, positive
from benchmarks.cost import SKETCH_SIZE
from benchmarks.late import verdict_of
from benchmarks.measure import banner, hardware, interleaved, say
from gaf_ddp import NeighborhoodAgreement, combine, gram
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.kernels.scale import correct, scale
from gaf_ddp.rules.agreement import decide

Call = Callable[[], object]


def ours(rows: Tensor) -> dict[str, Call]:
    """Return what one rank computes of the filter, by name."""
    world, count = rows.shape
    own, spans, part = rows[0].clone(), whole(count), rows[:, : count // world].contiguous()
    one = torch.ones((), dtype=torch.float64)
    shares, limit = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.full((), torch.inf, dtype=torch.float64)
    verdict = verdict_of(world, rows.device)

    def late() -> None:
        _, square = fold(own, spans, SKETCH_SIZE)
        scale(own, square, one, limit)
        correct(own, shares)
        verdict["tally"]()
        verdict["draw"]()

    def at_once() -> None:
        agreement = decide(gram(part), NeighborhoodAgreement(1.0), 10.0)
        combine(part, agreement.weights)

    return {"consensus, one step late": late, "tau, at once": at_once}


def others(rows: Tensor, bad: int) -> dict[str, Call]:
    """Return other packages' rules by name."""
    from byzfl import NNM, CenteredClipping, MultiKrum
    from byzpy.aggregators.geometric_wise.smea import SMEA
    from byzpy.aggregators.norm_wise.caf import CAF
    from torchjd.aggregation import Krum, UPGrad

    split = list(rows)
    mixed, chosen, clip = NNM(bad), MultiKrum(bad), CenteredClipping()
    smea, caf, upgrad, krum = SMEA(bad), CAF(bad), UPGrad(), Krum(bad, len(rows) - bad)
    return {
        "mixing + multi-Krum (ByzFL)": lambda: chosen(mixed(rows)),
        "centred clipping (ByzFL)": lambda: clip(rows),
        "SMEA (ByzPy)": lambda: smea.aggregate(split),
        "CAF (ByzPy)": lambda: caf.aggregate(split),
        "multi-Krum (TorchJD)": lambda: krum(rows),
        "UPGrad (TorchJD)": lambda: upgrad(rows),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = described(__doc__)
    parser.add_argument("--ranks", type=positive, default=8, metavar="W")
    parser.add_argument("--numbers", type=positive, default=11_200_000, help="of a gradient; resnet18's by default")
    parser.add_argument("--bad", type=positive, default=3, help="what others are told")
    parser.add_argument("--repeats", "-n", type=positive, default=3)
    given = parser.parse_args(arguments)
    if given.ranks < 2 * given.bad + 1:
        parser.error(f"--bad must be a minority of --ranks, found {given.bad} of {given.ranks}")
    torch.set_num_threads(1)
    device, random = torch.device("cpu"), torch.Generator().manual_seed(0)
    rows = torch.randn(given.numbers, generator=random) + torch.randn(given.ranks, given.numbers, generator=random)
    mean: dict[str, Call] = {"mean": lambda: rows.mean(0)}
    own = ours(rows)
    times = interleaved({**mean, **own, **others(rows, given.bad)}, given.repeats, device, warmup=1)
    say(banner(hardware(device)))
    say("| | ms | mean | received, gradients |")
    say("|---|--:|--:|--:|")
    ring = 2 * (given.ranks - 1) / given.ranks
    for name, seconds in times.items():
        relative = median(seconds) / median(times["mean"])
        received = ring if name in own or name in mean else given.ranks - 1
        say(f"| {name} | {1e3 * median(seconds):,.0f} | {relative:.2f} | {received:.2f} |")


if __name__ == "__main__":
    main()
