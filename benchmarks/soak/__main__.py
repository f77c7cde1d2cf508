"""Train for long through everything that may happen, with the filter and with plain DDP, and write down what grew.

    python -m benchmarks.soak --steps 20000 --out benchmarks/results/soak.md

Four ranks on gloo. Models, buckets, NaN, zero, flipped and huge ranks, bursts, schedules, no_sync, Join, unused
parameters, checkpoints: all from one seed. Replicas are compared by a hash of their bits every few steps. Slopes
are those of the second half, by least squares, the largest of the ranks', with their standard error. glibc lets
each thread keep what it freed, which grows with chance and is no leak; so both run with one arena for all threads,
and with the filter once more as glibc has it.
"""

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.command_line import described, new_file, positive
from benchmarks.soak.rank import soak
from benchmarks.soak.segments import SETTINGS, WORLD_SIZE
from tools.ranks import run_ranks

HELD = ("kilobytes", "threads", "descriptors")
_MOST_SECONDS_A_STEP = 0.5


def slope(samples: list[dict[str, int]], name: str) -> tuple[float, float]:
    """Return what grew in 1,000 steps of the second half, and its standard error."""
    half = samples[len(samples) // 2 :]
    x, y = [s["step"] / 1000 for s in half], [float(s[name]) for s in half]
    if len(half) < 3:
        return 0.0, math.inf
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - rise * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return rise, math.sqrt(rest / (len(half) - 2) / spread)


# By name: with the filter or without, and how many arenas malloc may have.
WAYS: dict[str, tuple[bool, str]] = {
    "with the filter": (True, "1"),
    "plain DDP": (False, "1"),
    "with the filter, arenas as they come": (True, ""),
}


def run(steps: int, seed: int, with_filter: bool, longest: int = 60, arenas: str = "") -> list[dict[str, Any]]:
    """Return every rank's counts, with the seconds it took; arenas: `MALLOC_ARENA_MAX`, or glibc's own."""
    settings = {"MALLOC_ARENA_MAX": arenas} if arenas else {}
    with patch.dict(os.environ, settings), tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        limit = 120 + steps * _MOST_SECONDS_A_STEP
        task = (soak, seed, steps, with_filter, longest)
        found = run_ranks(WORLD_SIZE, *task, folder=Path(folder), timeout=limit)
        return [{**counts, "seconds": round(time.monotonic() - start)} for counts in found]


def page(results: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """Return the page."""
    first = results["with the filter"][0]
    lines = [
        "# Soak",
        "",
        f"`python -m benchmarks.soak --steps {first['steps']} --seed {seed}`, {WORLD_SIZE} ranks on gloo, torch",
        f"{torch.__version__}, {time.strftime('%Y-%m-%d')}; {len(SETTINGS)} states, {first['restarts']} loaded",
        f"checkpoints, {first['joined']} stretches with uneven inputs.",
        "Slopes per 1,000 steps, second half, ± standard error.",
        "",
        "| | steps | seconds | compared | differed | memory, KB | threads | descriptors |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, ranks in results.items():
        grown = [max((slope(counts["samples"], held) for counts in ranks), default=(0, 0)) for held in HELD]
        numbers = " | ".join(f"{rise:+.2f} ± {error:.2f}" for rise, error in grown)
        counts = ranks[0]
        differed = max(rank["differed"] for rank in ranks)
        told = (counts["steps"], counts["seconds"], counts["compared"], differed)
        lines.append(f"| {name} | {' | '.join(f'{number:,}' for number in told)} | {numbers} |")
    for name, ranks in results.items():
        start, end = ranks[0]["samples"][0], ranks[0]["samples"][-1]
        held = ", ".join(f"{start[what]:,} and {end[what]:,} {what}" for what in HELD)
        lines += ["", f"Rank 0 {name} held, after {start['step']} steps and at the end: {held}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what was asked for."""
    parser = described(__doc__)
    parser.add_argument("--steps", type=positive, default=20_000, help="of each (20000)")
    parser.add_argument("--seed", type=positive, default=1, help="of everything (1)")
    parser.add_argument("--out", type=new_file, help="where the page goes, and beside it the counts as .json")
    given = parser.parse_args()
    results = {
        name: run(given.steps, given.seed, with_filter, arenas=arenas) for name, (with_filter, arenas) in WAYS.items()
    }
    text = page(results, given.seed)
    print(text)
    if given.out is not None:
        given.out.write_text(text)
        kept = {name: {"rank 0": ranks[0]} for name, ranks in results.items()}
        given.out.with_suffix(".json").write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
