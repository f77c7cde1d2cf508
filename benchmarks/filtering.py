"""The filtering core against the device's copy bandwidth: passes over gradients, decisions and verdicts.

    python -m benchmarks.filtering --json out.json

For each W and size of rows `(W, n)`: gram reads the rows once, combine reads them and writes a W-th. As one bucket,
fold reads them into a sketch of 4096 numbers, scale and correct read and write them, and the hash that replicas are
compared by reads them. `GB/s` is those bytes over the time, `roof` the share of the bandwidth of a copy of the rows
in the same run (bytes read and written). `torch` is the same with torch's own product in the rows' dtype, which is
less exact, and multiplies left-out rows. Calls rotate through buffers that together exceed the caches. Decisions are
in microseconds, and so are a verdict's two parts: the tally on the device, and draw on the host.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.command_line import described, new_file, positive
from benchmarks.cost import SKETCH_SIZE
from benchmarks.late import verdict_of
from benchmarks.measure import banner, calls_at_once, hardware, interleaved, say, write_json
from gaf_ddp import ConsensusAgreement, NeighborhoodAgreement, SequentialAgreement, Weighting, combine, gram
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.kernels.hash import hash_bits
from gaf_ddp.kernels.scale import correct, scale
from gaf_ddp.rules.agreement import decide

SIZES = (2**20, 25 * 2**20, 2**26, 2**28, 2**30)  # bytes
_CACHES = 2**28  # bytes; more than the last cache of the machines this was run on
_MOST_BUFFERS = 256


def rotating(function: Callable[[Tensor], object], buffers: list[Tensor]) -> Callable[[], object]:
    """Return a call of function on the next buffer each time."""
    turn = cycle(buffers)
    return lambda: function(next(turn))


def measure_rows(count: int, size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return one row of the table: W rows of together size bytes."""
    columns = max(size // (count * dtype.itemsize), 1)
    buffers = [
        torch.randn(count, columns, device=device).to(dtype) for _ in range(min(max(_CACHES // size, 1), _MOST_BUFFERS))
    ]
    weights = torch.full((count,), 1 / count, device=device)
    number = [torch.tensor(value, dtype=torch.float64, device=device) for value in (1.0, 2.0, torch.inf)]
    shares = torch.tensor([0.5, 0.0], dtype=torch.float64, device=device)
    spans = whole(count * columns)
    same, out, target = weights.to(dtype), torch.empty_like(buffers[0][0]), torch.empty_like(buffers[0])
    run = {
        "copy": rotating(target.copy_, buffers),
        "gram": rotating(gram, buffers),
        "gram_torch": rotating(lambda rows: rows @ rows.mT, buffers),
        "combine": rotating(lambda rows: combine(rows, weights, out=out), buffers),
        "fold": rotating(lambda rows: fold(rows.view(-1), spans, SKETCH_SIZE), buffers),
        "scale": rotating(lambda rows: scale(rows.view(-1), *number), buffers),  # halves
        "correct": rotating(lambda rows: correct(rows.view(-1), shares), buffers),  # doubles
        "hash": rotating(lambda rows: hash_bits([rows], device), buffers),
        "combine_torch": rotating(lambda rows: torch.mv(rows.mT, same, out=out), buffers),
    }
    calls = max(calls_at_once(size, device), min(20, 2**24 // size))
    timings = interleaved(run, repeats, device, calls)
    seconds = {name: median(times) for name, times in timings.items()}
    # Readings and writings of all rows; all else reads them once.
    passes = {"copy": 2.0, "scale": 2.0, "correct": 2.0, "combine": 1 + 1 / count}
    rate = {name: passes.get(name.removesuffix("_torch"), 1.0) * size / seconds[name] / 1e9 for name in seconds}
    return {
        "W": count,
        "size": size,
        "type": str(dtype).removeprefix("torch."),
        "GBps": rate,
        "roof": {name: rate[name] / rate["copy"] for name in rate},
    }


def measure_decision(count: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the microseconds of one decision and of a verdict over W ranks, with the guards and the record."""
    gramian = gram(torch.randn(count, 2 * count, device=device))
    rules: dict[str, Weighting] = {
        "neighborhood": NeighborhoodAgreement(1.0),
        "sequential": SequentialAgreement(1.0),
        "consensus": ConsensusAgreement(),
    }
    timings = interleaved(
        {name: partial(decide, gramian, rule, 10.0) for name, rule in rules.items()} | verdict_of(count, device),
        repeats,
        device,
        calls=max(1, 256 // count),
    )
    return {"W": count, "decision_us": {name: median(times) * 1e6 for name, times in timings.items()}}


def row_text(row: dict[str, Any]) -> str:
    """Return one aligned line."""
    if "decision_us" in row:
        return f"{row['W']:>5} decision  " + "  ".join(f"{k} {v:.0f} us" for k, v in row["decision_us"].items())
    rate, roof = row["GBps"], row["roof"]
    return (
        f"{row['W']:>5} {row['size']:>11} {row['type']:>9} {rate['copy']:>8.1f} "
        + " ".join(
            f"{rate[n]:>8.1f} {roof[n]:>5.0%} {rate[n + '_torch']:>8.1f} {roof[n + '_torch']:>5.0%}"
            for n in ("gram", "combine")
        )
        + "".join(f" {rate[n]:>8.1f} {roof[n]:>5.0%}" for n in ("fold", "scale", "correct", "hash"))
    )


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = described(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-bytes", type=positive, help="largest rows; default 1 GB on a GPU, 64 MB on a CPU")
    parser.add_argument("-n", "--repeats", type=positive, default=9)
    parser.add_argument("--json", type=new_file, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="one size, two W, few repeats")
    given = parser.parse_args()
    if given.max_bytes is not None and given.max_bytes < SIZES[0]:
        parser.error(f"--max-bytes must be at least {SIZES[0]}, found {given.max_bytes}")
    return given


def main() -> None:
    """Sweep W, sizes and dtypes and print a table."""
    given = arguments()
    device = torch.device(given.device)
    largest = given.max_bytes or (2**30 if device.type == "cuda" else 2**26)
    sizes = [size for size in SIZES if size <= largest]
    counts, decisions = [2, 4, 8, 16, 32, 64], [2, 8, 64, 256, 1024]
    if given.quick:
        sizes, counts, decisions, given.repeats = [2**20], [2, 8], [2, 8], 3
    facts, rows = hardware(device), []
    say(banner(facts))
    columns = [f"{name + ' GB/s':>8} {'roof':>5} {'torch':>8} {'roof':>5}" for name in ("gram", "comb")]
    columns += [f"{name + ' GB/s':>8} {'roof':>5}" for name in ("fold", "scale", "corr", "hash")]
    say(f"#{'W':>4} {'size':>11} {'type':>9} {'copy':>8} {' '.join(columns)}")
    for dtype, size, count in product((torch.float32, torch.bfloat16), sizes, counts):
        rows.append(measure_rows(count, size, dtype, device, given.repeats))
        say(row_text(rows[-1]))
    for count in decisions:
        rows.append(measure_decision(count, device, given.repeats))
        say(row_text(rows[-1]))
    write_json(given.json, facts, rows)


if __name__ == "__main__":
    main()
