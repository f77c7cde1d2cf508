"""Collectives in nccl-tests' columns, with the filter's exchanges beside the all-reduce they replace.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.collectives -b 8 -e 1G -f 4 --json out.json

algbw is the buffer's size over the time. busbw is algbw times the share of the size that each rank must send,
2 (W − 1)/W for an all-reduce and (W − 1)/W for the others, so that it compares with the link's speed whatever
W is. The filter's exchanges are given all_reduce's factor: their busbw says how much of an all-reduce's speed
is left. Their time includes the Gramian, the decision and the weighted sum; gaf_late is `GAFState()`, one step late,
with a ballot and a verdict for every bucket. memory is what the first call took at
most beyond its buffers, in buffers; small sizes show the start-up of the collective itself.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.command_line import described, new_file, positive, size_in_bytes
from benchmarks.cost import SKETCH_SIZE
from benchmarks.late import late_filter
from benchmarks.measure import (
    banner,
    calls_at_once,
    end_ranks,
    hardware,
    interleaved,
    peak_memory,
    ratio,
    say,
    start_ranks,
    write_json,
)
from gaf_ddp import NeighborhoodAgreement, gram
from gaf_ddp.exchange.gather import GatherExchange
from gaf_ddp.exchange.protocol import Exchange
from gaf_ddp.exchange.sharded import ShardedExchange
from gaf_ddp.exchange.sketched import SketchExchange
from gaf_ddp.rules.agreement import decide
from gaf_ddp.runtime.collectives import all_gather_single, reduce_scatter_single

Operation = tuple[Callable[[], object], Callable[[], int], float]  # run, count wrong elements, busbw factor


def exchanges(group: dist.ProcessGroup) -> dict[str, Exchange]:
    """Return the exchanges that the hook would choose from."""
    return {
        "sketch": SketchExchange(group, SKETCH_SIZE),
        "sharded": ShardedExchange(group),
        "gather": GatherExchange(group),
    }


def filter_bucket(exchange: Exchange, bucket: Tensor) -> None:
    """Do what the hook does for one bucket."""
    rows = exchange.scatter(bucket)
    products = gram(rows)
    message = products.new_zeros(1, len(rows))  # as the hook's, of its settings
    gramian = exchange.sum(torch.cat([products, message]))[:-1]
    exchange.gather(rows, decide(gramian, NeighborhoodAgreement(2.0), 10.0).weights, bucket)


def operations(count: int, dtype: torch.dtype, device: torch.device) -> dict[str, Operation]:
    """Return every collective on buffers of count elements, a multiple of W, 1 + rank in each to start with."""
    size, rank = dist.get_world_size(), dist.get_rank()
    full = torch.full((count,), 1.0 + rank, dtype=dtype, device=device)
    slice_ = full[: count // size].clone()
    reduced, out, small = torch.zeros_like(full), torch.empty_like(full), torch.empty_like(slice_)
    group = dist.group.WORLD
    assert group is not None
    total, half = torch.tensor(size * (size + 1) / 2, device=device), (size - 1) / size
    by_rank = 1.0 + torch.arange(size, device=device).repeat_interleave(len(slice_))

    def operation(run: Callable[[], object], result: Tensor, expected: Tensor, factor: float) -> Operation:
        return run, partial(count_wrong, run, result, full, expected), factor

    named = {
        "all_reduce": operation(lambda: dist.all_reduce(reduced), reduced, total, 2 * half),
        "reduce_scatter": operation(lambda: reduce_scatter_single(small, full), small, total, half),
        "all_gather": operation(lambda: all_gather_single(out, slice_), out, by_rank, half),
        "all_to_all": operation(lambda: dist.all_to_all_single(out, full), out, by_rank, half),
    }
    ways: dict[str, Callable[[Tensor], None]] = {"late": late_filter(group, device)}
    ways |= {name: partial(filter_bucket, exchange) for name, exchange in exchanges(group).items()}
    for name, way in ways.items():
        filtered = full.clone()
        run = partial(way, filtered)
        named[f"gaf_{name}"] = operation(run, filtered, total / size, 2 * half)
    return named


def count_wrong(run: Callable[[], object], result: Tensor, full: Tensor, expected: Tensor) -> int:
    """Return how many elements of the result are wrong after a run on buffers as they were at first."""
    if result.shape == full.shape:
        result.copy_(full)
    run()
    return int((~torch.isclose(result.float(), expected, rtol=1e-2)).sum())


def measure_size(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Return one row per collective for buffers of about this many bytes."""
    world = dist.get_world_size()
    count = max(size // (dtype.itemsize * world), 1) * world  # every rank's slices alike
    size = count * dtype.itemsize
    named = operations(count, dtype, device)
    calls = calls_at_once(size, device)
    memory = {name: peak_memory(run, device) / size for name, (run, _, _) in named.items()}
    timings = interleaved({name: run for name, (run, _, _) in named.items()}, repeats, device, calls)
    rows = []
    for name, (_, wrong, factor) in named.items():
        seconds = median(timings[name])
        rows.append(
            {
                "collective": name,
                "size": size,
                "count": count,
                "type": str(dtype).removeprefix("torch."),
                "time_us": seconds * 1e6,
                "algbw_GBps": size / seconds / 1e9,
                "busbw_GBps": size / seconds / 1e9 * factor,
                "wrong": wrong(),
                "memory_buckets": memory[name],
                "to_all_reduce": ratio(timings, name, "all_reduce"),
            }
        )
    return rows


def row_text(row: dict[str, Any]) -> str:
    """Return one line in nccl-tests' columns."""
    return (
        f"{row['size']:>12} {row['count']:>12} {row['type']:>9} {row['time_us']:>11.1f} {row['algbw_GBps']:>8.3f} "
        f"{row['busbw_GBps']:>8.3f} {row['wrong']:>7} {row['to_all_reduce']['median']:>8.2f} "
        f"{row['memory_buckets']:>7.2f}  {row['collective']}"
    )


def arguments() -> argparse.Namespace:
    """Return the command line, with nccl-tests' letters."""
    parser = described(__doc__)
    parser.add_argument("-b", "--minbytes", type=size_in_bytes, default=8, help="smallest buffer, e.g. 64K")
    parser.add_argument(
        "-e",
        "--maxbytes",
        type=size_in_bytes,
        default=2**30,
        help="largest buffer, e.g. 25M; gather holds W of them",
    )
    parser.add_argument("-f", "--stepfactor", type=int, default=4, help="between sizes")
    parser.add_argument("-n", "--repeats", type=positive, default=11, help="timings of each")
    parser.add_argument("-d", "--datatype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--json", type=new_file, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="three sizes up to 1 MB, few repeats")
    given = parser.parse_args()
    if given.stepfactor < 2:
        parser.error(f"--stepfactor must be at least 2, found {given.stepfactor}")
    if given.maxbytes < given.minbytes:
        parser.error(f"--maxbytes must be at least --minbytes, {given.minbytes}, found {given.maxbytes}")
    if given.quick:
        given.minbytes, given.maxbytes, given.stepfactor, given.repeats = 1024, 2**20, 32, 3
    return given


def main() -> None:
    """Sweep the sizes and print a table."""
    given, device = arguments(), start_ranks()
    facts = hardware(device)
    say(banner(facts))
    names = ("time(us)", 11), ("algbw", 8), ("busbw", 8), ("#wrong", 7), ("ratio", 8), ("memory", 7)
    say(f"#{'size':>11} {'count':>12} {'type':>9} " + " ".join(f"{name:>{width}}" for name, width in names))
    rows, size = [], given.minbytes
    while size <= given.maxbytes:
        fresh = measure_size(size, getattr(torch, given.datatype), device, given.repeats)
        say("\n".join(row_text(row) for row in fresh))
        rows += fresh
        size *= given.stepfactor
    write_json(given.json, facts, rows)
    end_ranks()


if __name__ == "__main__":
    main()
