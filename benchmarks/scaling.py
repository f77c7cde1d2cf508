"""What the filter costs from W = 2 to 1024, from the model in cost.py with constants measured here, and a check.

    torchrun --standalone --nproc-per-node 8 -m benchmarks.scaling --json out.json --plot out.png
    torchrun --standalone --nproc-per-node 8 -m benchmarks.scaling --ranks-per-host 1 4 8 --plot out.png

alpha and beta come from two ranks, of two hosts if there are several; the passes, the decision and the verdict, with
how many steps share one, from one. Groups
of the first 2, 4, … ranks are then measured beside the model. `bytes` are those that leave a host, relative to an
all-reduce's; --ranks-per-host asks for hosts of other sizes than these. Where ranks share cores, as on one
machine, the measured points hold the others' work too and lie above the model.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.collectives import exchanges, filter_bucket
from benchmarks.command_line import described, new_file, positive, size_in_bytes
from benchmarks.cost import SKETCH_SIZE, WORLD_SIZES, Constants, predict
from benchmarks.late import late_filter, verdict_of
from benchmarks.measure import (
    Timings,
    banner,
    calls_at_once,
    end_ranks,
    hardware,
    interleaved,
    say,
    start_ranks,
    write_json,
)
from benchmarks.pictures import draw_scaling
from gaf_ddp import NeighborhoodAgreement, combine, gram
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.kernels.scale import scale
from gaf_ddp.rules.agreement import decide


def ranks_of_a_host() -> int:
    """Return how many ranks share a host, 1 if there is only one host: its ranks stand for hosts then."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return local if local < dist.get_world_size() else 1


def subgroup(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """Return a group of these ranks, None on the others."""
    group = dist.new_group(list(ranks))
    return group if isinstance(group, dist.ProcessGroup) and dist.get_rank() in ranks else None


def measure_constants(size: int, device: torch.device, repeats: int) -> Constants:
    """Return the constants, from the first ranks of the first two hosts; every rank gets rank 0's."""
    first, pair = subgroup([0]), subgroup([0, ranks_of_a_host()])
    found: list[Constants | None] = [None]
    # The others wait meanwhile, and compute nothing.
    passes = {} if first is None else measure_passes(first, size, device, repeats)
    messages = {} if pair is None else measure_messages(pair, size, device, repeats)
    if first is not None:
        found = [Constants(
            alpha=messages["small"] / 2,  # two messages at W = 2
            beta=(messages["large"] - messages["small"]) / size,
            gram=passes["gram"] / size,
            combine=passes["combine"] / size,
            fold=passes["fold"] / size,
            scale=passes["scale"] / size,
            decision={world: passes[f"decide {world}"] for world in WORLD_SIZES},
            verdict={world: passes[f"tally {world}"] + passes[f"draw {world}"] for world in WORLD_SIZES},
        )]  # fmt: skip
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def measure_passes(group: dist.ProcessGroup, size: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Return the seconds of the passes over size bytes, and of a decision and a verdict by their W."""
    rows, weights = torch.randn(4, size // 16, device=device), torch.full((4,), 0.25, device=device)
    shard = torch.empty_like(rows[0])
    bucket = rows.view(-1)
    square, ranks, limit = (torch.tensor(x, dtype=torch.float64, device=device) for x in (1.0, 1.0, 0.9999))
    run: dict[str, Callable[[], object]] = {
        "gram": lambda: gram(rows),
        "combine": lambda: combine(rows, weights, out=shard),
        "fold": lambda: fold(bucket, whole(len(bucket)), SKETCH_SIZE),
        "scale": lambda: scale(bucket, square, ranks, limit),  # shortens it a little
    }
    for world in WORLD_SIZES:
        gramian = gram(torch.randn(world, 2 * world, device=device))
        run[f"decide {world}"] = partial(decide, gramian, NeighborhoodAgreement(1.0), 10.0)
        run |= {f"{part} {world}": call for part, call in verdict_of(world, device).items()}
    return medians(interleaved(run, repeats, device, calls_at_once(size, device), group=group))


def measure_messages(pair: dist.ProcessGroup, size: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Return the seconds of an all-reduce of two numbers and of size bytes."""
    small, large = torch.zeros(2, device=device), torch.zeros(size // 4, device=device)
    run = {
        "small": partial(dist.all_reduce, small, group=pair),
        "large": partial(dist.all_reduce, large, group=pair),
    }
    return medians(interleaved(run, repeats, device, calls_at_once(size, device), group=pair))


def medians(timings: Timings) -> dict[str, float]:
    """Return each candidate's median."""
    return {name: median(times) for name, times in timings.items()}


def measure_points(size: int, device: torch.device, repeats: int) -> list[dict[str, float]]:
    """Return the measured seconds over the first 2, 4, … ranks while the others wait."""
    points = []
    for world in (w for w in WORLD_SIZES if 2 * ranks_of_a_host() <= w <= dist.get_world_size()):
        group = subgroup(range(world))
        if group is not None:
            plain, bucket = torch.randn(2, size // 4, device=device)
            run: dict[str, Callable[[], object]] = {"all_reduce": partial(dist.all_reduce, plain.zero_(), group=group)}
            run["late"] = partial(late_filter(group, device), bucket.clone())
            for name, exchange in exchanges(group).items():
                if name != "gather":  # holds W buckets
                    run[name] = partial(filter_bucket, exchange, bucket)
            timings = interleaved(run, repeats, device, calls_at_once(size, device), group=group)
            points.append({"W": world} | medians(timings))
        dist.barrier()
    return points


def table(rows: list[dict[str, Any]]) -> str:
    """Return one aligned line per W; times and bytes are ratios to an all-reduce, memory is in buckets."""
    names = ("late", "sketch", "sharded", "gather")
    columns = "".join(f" | {name:>7} {'measured':>8} {'bytes':>7} {'memory':>7}" for name in names)
    lines = [f"#{'W':>5} {'all_reduce':>11}{columns} | {'decision':>9} {'verdict':>9} {'steps':>5}"]
    for row in rows:
        line = f"{row['W']:>6} {row['all_reduce_ms']:>9.1f}ms"
        for name in names:
            cost, point = row[name], row["measured"] or {}
            measured = f"{point[name] / point['all_reduce']:.2f}" if name in point else ""
            line += f" | {cost['time_ratio']:>7.2f} {measured:>8} {cost['bytes_ratio']:>7.3f}"
            line += f" {cost['memory_buckets']:>7.2f}"
        lines.append(f"{line} | {row['decision_us']:>7.0f}us {row['verdict_us']:>7.0f}us {row['steps_of_a_ballot']:>5}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = described(__doc__)
    parser.add_argument(
        "--ranks-per-host", type=int, nargs="+", choices=[1, 2, 4, 8, 16], help="in the model; default: as here"
    )
    parser.add_argument("--size", type=size_in_bytes, default=25 * 2**20, help="bytes of the bucket")
    parser.add_argument("-n", "--repeats", type=positive, default=7)
    parser.add_argument("--json", type=new_file, help="write the rows here")
    parser.add_argument("--plot", type=new_file, help="write the picture here")
    parser.add_argument("--quick", action="store_true", help="a 1 MB bucket, few repeats")
    given = parser.parse_args()
    if given.size < 2**12:
        parser.error(f"--size must be at least 4K, found {given.size}")
    if given.quick:
        given.size, given.repeats = 2**20, 3
    return given


def main() -> None:
    """Measure, predict, compare, print."""
    given, device = arguments(), start_ranks()
    if dist.get_world_size() < 2:
        raise SystemExit("scaling needs at least two ranks: torchrun --nproc-per-node 2, found 1")
    constants = measure_constants(given.size, device, given.repeats)
    here = ranks_of_a_host()
    results: list[dict[str, Any]] = []
    for ranks_per_host in given.ranks_per_host or [here]:
        points = measure_points(given.size, device, given.repeats) if ranks_per_host == here else []
        facts = hardware(device) | {
            "bucket_bytes": given.size,
            "ranks_per_host": ranks_per_host,
            "alpha_us": constants.alpha * 1e6,
            "beta_ns_per_byte": constants.beta * 1e9,
        }
        rows = predict(constants, points, given.size, ranks_per_host)
        say(banner(facts))
        say(table(rows))
        write_json(given.json, facts, rows, append=bool(results))
        results.append({"hardware": facts, "rows": rows})
    if given.plot and dist.get_rank() == 0:
        draw_scaling(results, given.plot)
    end_ranks()


if __name__ == "__main__":
    main()
