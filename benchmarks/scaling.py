"""What the filter costs from W = 2 to 1024, from an alpha-beta model with constants measured here, and a check.

    torchrun --standalone --nproc-per-node 8 -m benchmarks.scaling --json out.json --plot out.png

A message of s bytes takes `alpha + beta s`. A ring all-reduce of S bytes is 2 (W − 1) messages of S/W. The sharded
filter is W − 1 messages of S/W out and as many back, a ring all-reduce of the Gramian, one pass of
gram and one of combine over S bytes, and the decision. The gather filter is W − 1 messages of S, a broadcast of
the Gramian, passes over W S bytes and an all-reduce. Constants come from two ranks (alpha, beta) and from one
(passes, decision); subgroups of 2, 4, … ranks are then measured beside the model. Where ranks share cores, as on
one machine, the measured points hold the others' work too and lie above it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.collectives import exchanges, filter_bucket
from benchmarks.command_line import described, new_file, positive, size_in_bytes
from benchmarks.measure import (
    Timings,
    banner,
    calls_at_once,
    end_ranks,
    hardware,
    interleaved,
    machine,
    say,
    start_ranks,
    write_json,
)
from gaf_ddp import NeighborhoodAgreement, combine, gram
from gaf_ddp.agreement import decide
from gaf_ddp.collectives import reduced_numbers

WORLD_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Constants:
    """What one machine is measured to do."""

    alpha: float  # seconds per message
    beta: float  # seconds per byte sent
    gram: float  # seconds per byte of rows
    combine: float  # seconds per byte of rows
    decision: dict[int, float]  # seconds by W


@dataclass(frozen=True)
class Cost:
    """Of one bucket, per rank."""

    seconds: float
    bytes_sent: float
    memory: float  # bytes beside the bucket


def all_reduce(world: int, size: float, c: Constants) -> Cost:
    """Return the cost of a ring all-reduce."""
    sent = 2 * (world - 1) / world * size
    return Cost(2 * (world - 1) * c.alpha + sent * c.beta, sent, 0.0)


def sharded(world: int, size: float, c: Constants) -> Cost:
    """Return the cost of the sharded filter."""
    gramian = all_reduce(world, 8 * (reduced_numbers(world) + world), c)
    travel = 2 * (world - 1) * c.alpha + 2 * (world - 1) / world * size * c.beta
    seconds = travel + gramian.seconds + size * (c.gram + c.combine) + c.decision[world]
    return Cost(seconds, 2 * (world - 1) / world * size + gramian.bytes_sent, size + 8 * world**2)


def gather(world: int, size: float, c: Constants) -> Cost:
    """Return the cost of the gather filter."""
    reduce, sent = all_reduce(world, size, c), (world - 1) * size
    seconds = (world - 1) * c.alpha + sent * c.beta + reduce.seconds + 8 * world**2 * c.beta + c.alpha
    seconds += world * size * c.gram + size * c.combine + c.decision[world]
    return Cost(seconds, sent + reduce.bytes_sent, world * size + 8 * world**2)


def subgroup(world: int) -> dist.ProcessGroup | None:
    """Return a group of the first ranks, None on the others."""
    group = dist.new_group(list(range(world)))
    return group if isinstance(group, dist.ProcessGroup) and dist.get_rank() < world else None


def measure_constants(size: int, device: torch.device, repeats: int) -> Constants:
    """Return the constants, from the first rank and the first two; every rank gets rank 0's."""
    first, pair = subgroup(1), subgroup(2)
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
            decision={world: passes[str(world)] for world in WORLD_SIZES},
        )]  # fmt: skip
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def measure_passes(group: dist.ProcessGroup, size: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Return the seconds of gram and combine over size bytes, and of a decision by its W."""
    rows, weights = torch.randn(4, size // 16, device=device), torch.full((4,), 0.25, device=device)
    shard = torch.empty_like(rows[0])
    run: dict[str, Callable[[], object]] = {
        "gram": lambda: gram(rows),
        "combine": lambda: combine(rows, weights, out=shard),
    }
    for world in WORLD_SIZES:
        gramian = gram(torch.randn(world, 2 * world, device=device))
        run[str(world)] = partial(decide, gramian, NeighborhoodAgreement(1.0), 10.0)
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
    for world in (w for w in WORLD_SIZES if w <= dist.get_world_size()):
        group = subgroup(world)
        if group is not None:
            plain, bucket = torch.randn(2, size // 4, device=device)
            exchange = exchanges(group, device)["sharded"]
            run: dict[str, Callable[[], object]] = {
                "all_reduce": partial(dist.all_reduce, plain.zero_(), group=group),
                "sharded": partial(filter_bucket, exchange, bucket),
            }
            timings = interleaved(run, repeats, device, calls_at_once(size, device), group=group)
            points.append({"W": world} | medians(timings))
        dist.barrier()
    return points


def draw(rows: list[dict[str, Any]], points: list[dict[str, float]], facts: dict[str, Any], path: Path) -> None:
    """Write the picture: time and bytes relative to an all-reduce, over W."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    worlds = [row["W"] for row in rows]
    for axis, key, title in zip(axes, ("time_ratio", "bytes_ratio"), ("Time", "Bytes sent"), strict=True):
        for name, colour in (("sharded", "#0072B2"), ("gather", "#D55E00")):
            values = [row[name][key] for row in rows]
            axis.plot(worlds, values, color=colour)
            axis.annotate(name, (worlds[4], values[4]), textcoords="offset points", xytext=(0, 8), color=colour)
        axis.axhline(1.0, color="0.6", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="ranks W", title=f"{title}, all-reduce = 1")
        axis.set_xticks(worlds, [str(w) for w in worlds])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    measured = [(p["W"], p["sharded"] / p["all_reduce"]) for p in points]
    axes[0].plot(*zip(*measured, strict=True), "o", color="#0072B2")
    axes[0].set_title("Time, all-reduce = 1 (dots: measured)")
    megabytes = facts["bucket_bytes"] / 2**20
    figure.suptitle(f"One bucket of {megabytes:.0f} MB: model, with constants measured on this machine")
    figure.supxlabel(machine(facts), fontsize=8, color="0.4")
    figure.savefig(path, dpi=120)


def predict(constants: Constants, points: list[dict[str, float]], size: int) -> list[dict[str, Any]]:
    """Return one row per W: the model, and what was measured there."""
    rows = []
    for world in WORLD_SIZES:
        plain = all_reduce(world, size, constants)
        row: dict[str, Any] = {
            "W": world,
            "all_reduce_ms": plain.seconds * 1e3,
            "decision_us": constants.decision[world] * 1e6,
            "measured": next((p for p in points if p["W"] == world), None),
        }
        for name, cost in (
            ("sharded", sharded(world, size, constants)),
            ("gather", gather(world, size, constants)),
        ):
            row[name] = {
                "time_ratio": cost.seconds / plain.seconds,
                "bytes_ratio": cost.bytes_sent / plain.bytes_sent,
                "memory_buckets": cost.memory / size,
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return one aligned line per W; times and bytes are ratios to an all-reduce, memory is in buckets."""
    lines = [
        f"#{'W':>5} {'all_reduce':>11} | {'sharded':>8} {'measured':>8} {'bytes':>6} {'memory':>6} | "
        f"{'gather':>8} {'bytes':>7} {'memory':>7} | {'decision':>9}"
    ]
    for row in rows:
        one, all_, point = row["sharded"], row["gather"], row["measured"]
        measured = f"{point['sharded'] / point['all_reduce']:.2f}" if point else ""
        lines.append(
            f"{row['W']:>6} {row['all_reduce_ms']:>9.1f}ms | {one['time_ratio']:>8.2f} {measured:>8} "
            f"{one['bytes_ratio']:>6.3f} {one['memory_buckets']:>6.2f} | {all_['time_ratio']:>8.2f} "
            f"{all_['bytes_ratio']:>7.2f} {all_['memory_buckets']:>7.1f} | {row['decision_us']:>7.0f}us"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = described(__doc__)
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
    points = measure_points(given.size, device, given.repeats)
    facts = hardware(device) | {
        "bucket_bytes": given.size,
        "alpha_us": constants.alpha * 1e6,
        "beta_ns_per_byte": constants.beta * 1e9,
    }
    rows = predict(constants, points, given.size)
    say(banner(facts))
    say(table(rows))
    write_json(given.json, facts, rows)
    if given.plot and dist.get_rank() == 0:
        draw(rows, points, facts, given.plot)
    end_ranks()


if __name__ == "__main__":
    main()
