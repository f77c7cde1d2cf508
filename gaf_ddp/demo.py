"""See the filter work: ranks on this machine train a small network, one of them on wrong labels.

python -m gaf_ddp.demo
torchrun --standalone --nproc-per-node 4 -m gaf_ddp.demo

Trains twice from the same start on the same data, by averaging and with `GAFState()`, and prints accuracy on clean
test data and how often each rank was kept. Data are points around 20 centres in 32 dimensions, two centres to each
of 10 classes, drawn from a seed; the bad rank is told the next class's label for each of its points. Needs torch
alone.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp.hook import gaf_hook
from gaf_ddp.monitor.log import AgreementLog
from gaf_ddp.state import GAFState

_CLASSES, _DIMENSIONS, _BATCH = 10, 32, 16
_SPREAD = 1.3  # of the points around a centre; that of the centres is 1
_CENTRES, _TEST = 0, 1  # seeds; rank r draws its data by 100 + r


@dataclass(frozen=True)
class Plan:
    """What to run."""

    ranks: int
    steps: int
    bad_rank: int | None
    log: Path


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points `(count, 32)` and their classes `(count,)`, the same for the same seed."""
    generator = torch.Generator().manual_seed(_CENTRES)
    centres = torch.randn(2 * _CLASSES, _DIMENSIONS, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(2 * _CLASSES, (count,), generator=generator)
    return centres[which] + _SPREAD * torch.randn(count, _DIMENSIONS, generator=generator), which % _CLASSES


def train(plan: Plan, state: GAFState | None) -> tuple[float, list[float]]:
    """Train on this rank; return the accuracy in percent, and how often each rank was kept, in percent."""
    rank = dist.get_rank()
    inputs, labels = points(1000, seed=100 + rank)
    if rank == plan.bad_rank:
        labels = (labels + 1) % _CLASSES
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(_DIMENSIONS, 128), nn.ReLU(), nn.Linear(128, _CLASSES)))
    log = None
    if state is not None:
        model.register_comm_hook(state, gaf_hook)
        log = AgreementLog(state, plan.log, every=max(1, plan.steps // 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(rank)
    for _ in range(plan.steps):
        chosen = torch.randint(len(inputs), (_BATCH,), generator=order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        if log is not None:
            log.step()
    return _accuracy(model.module), [] if state is None else _kept(state)


def _accuracy(model: nn.Module) -> float:
    inputs, labels = points(5000, _TEST)
    with torch.no_grad():
        return 100 * float((model(inputs).argmax(1) == labels).double().mean())


def _kept(state: GAFState) -> list[float]:
    return [100 * share for name, share in state.summary().items() if name.startswith("gaf/kept_rank")]


def table(plan: Plan, averaging: float, filtered: float, kept: Sequence[float]) -> str:
    """Return what came out, a line each."""
    names = [f"rank {rank}{'!' * (rank == plan.bad_rank)}" for rank in range(plan.ranks)]
    rows = [
        ["method", "accuracy", "kept:", *names],
        ["averaging", f"{averaging:.1f} %", "", *["all" for _ in names]],
        ["GAFState()", f"{filtered:.1f} %", "", *[f"{share:.0f} %" for share in kept]],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def run(plan: Plan) -> None:
    """Train both ways on this rank of the default group; the first rank tells."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    averaging, _ = train(plan, None)
    filtered, kept = train(plan, GAFState())
    if dist.get_rank():
        return
    wrong = "" if plan.bad_rank is None else f"; rank {plan.bad_rank}! learns from wrong labels"
    print(f"{plan.ranks} ranks, {plan.steps} steps of {_BATCH} points a rank{wrong}\n")
    print(table(plan, averaging, filtered, kept))
    print(f"\nin {time.perf_counter() - begun:.0f} s; python -m gaf_ddp.report {plan.log} draws the log", flush=True)


def _spawned(rank: int, plan: Plan, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=plan.ranks)
    run(plan)
    dist.destroy_process_group()


def _spawn(plan: Plan) -> None:
    """Start the ranks, which meet on this machine alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            _spawned, (plan, str(Path(folder) / "store")), nprocs=plan.ranks
        )


def parse(arguments: Sequence[str] | None, world: int | None) -> Plan:
    """Return the plan; ends with one line and exit code 2 where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m gaf_ddp.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=world or 4, help="3 to 64 (default 4); torchrun has its own")
    parser.add_argument("--steps", type=int, default=300, help="default 300")
    parser.add_argument("--bad-rank", type=int, default=1, help="default 1; -1 for none")
    parser.add_argument("--out", type=Path, default=Path("agreement.jsonl"), help="default agreement.jsonl")
    found = parser.parse_args(arguments)
    if world not in (None, found.ranks):
        parser.error(f"--ranks must be torchrun's {world} or left out, found {found.ranks}")
    if not 3 <= found.ranks <= 64:
        parser.error(f"--ranks must be 3 to 64, as two ranks cannot outvote one, found {found.ranks}")
    if found.steps < 1:
        parser.error(f"--steps must be at least 1, found {found.steps}")
    if not -1 <= found.bad_rank < found.ranks:
        parser.error(f"--bad-rank must be one of the {found.ranks} ranks or -1, found {found.bad_rank}")
    if not found.out.parent.is_dir() or found.out.is_dir():
        parser.error(f"--out must be a file in an existing folder, found {found.out}")
    return Plan(found.ranks, found.steps, found.bad_rank if found.bad_rank >= 0 else None, found.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo, on ranks of its own or as one of torchrun's."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        _spawn(parse(arguments, None))
        return
    plan = parse(arguments, int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo")
    run(plan)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
