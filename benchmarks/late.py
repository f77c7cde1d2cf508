"""The late way's parts, to be timed: one bucket through it, and the verdict's two parts."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.cost import SKETCH_SIZE
from gaf_ddp import ConsensusAgreement, GAFState
from gaf_ddp.ballots.ballot import Numbers
from gaf_ddp.ballots.judge import Judge
from gaf_ddp.ballots.late import LateFilter
from gaf_ddp.ballots.verdict import draw
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.kernels.scale import correct
from gaf_ddp.rules.memory import MOMENTUM


def verdict_of(world: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the two parts of a verdict over so many ranks whose gradients are alike.

    Returns:
        `"tally"`, on the device: inner products of all ranks' sketches and momenta; and `"draw"`, on the host: the
        rule, the guards and the record.
    """
    random = torch.Generator().manual_seed(world)
    sketches = 1 + torch.randn(world, SKETCH_SIZE, generator=random)
    judge, voters = Judge(ConsensusAgreement().ratio, MOMENTUM), Voters(list(range(world)))
    squares = sketches.double().square().sum(1, keepdim=True)
    none = torch.zeros(world, 2, dtype=torch.float64)
    zero = none[:, 0]
    numbers = Numbers(squares, zero, none, zero, zero, zero, none, squares.sum(1), zero)
    products, sketches = judge.tally(sketches, 1), sketches.to(device)
    limits, counted = torch.full((world, 1), torch.inf, dtype=torch.float64), torch.ones(world, dtype=torch.bool)
    counts = Judge(ConsensusAgreement().ratio, MOMENTUM)
    return {
        "tally": lambda: counts.tally(sketches, 1),
        "draw": lambda: draw(judge, products, numbers, voters, 1, 10.0, limits, counted),
    }


def late_filter(group: dist.ProcessGroup, device: torch.device) -> Callable[[Tensor], None]:
    """Return what the hook does one step late for a model of one bucket, its ballot and verdict with it.

    Its ratio keeps everyone, however the buffers differ.
    """
    state = GAFState(group, weighting=ConsensusAgreement(1e9), judge_every=1)
    state._records.statistics.hosts, state._records.statistics.speaks = ["host"] * group.size(), False
    late, parameters = LateFilter(state, group, device), [nn.Parameter(torch.empty(0))]

    def run(bucket: Tensor) -> None:
        late.begin()
        share, _ = late.weigh(bucket, parameters, bucket.numel())
        for work in [dist.all_reduce(each, group=group, async_op=True) for each in (bucket, share)]:
            if work is not None:
                work.wait()
        correct(bucket, share)
        late.end()

    return run
