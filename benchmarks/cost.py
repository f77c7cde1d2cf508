"""What one bucket costs a rank: an alpha-beta model of the all-reduce and of the filter's ways.

A message of s bytes takes `alpha + beta s`, and those that leave a host share its link. A ring all-reduce of S bytes
is 2 (W − 1) messages of S/W, of which one rank's leave its host. The sharded filter is W − 1 messages of S/W, of which
every rank's to other hosts leave, half a ring, and one pass of gram and one of combine over S bytes. One
step late is a ring all-reduce of S and one of 16 bytes, a pass of fold and one of scale over S bytes, and once in so
many steps, which are of this bucket alone, a ring all-gather of sketches and a verdict. The gather of ballots is
counted as if nothing ran beside it. The sketch filter is a pass of fold and one of combine over S bytes, the sketch
to every rank, or its slices beyond 256 KB of sketches, and a ring all-reduce. The gather filter is a ring all-gather
of S, a broadcast of the Gramian, passes over W S bytes and an all-reduce. The sharded and the sketch filter
all-reduce the Gramian, and all three decide.
"""

from dataclasses import dataclass
from typing import Any

from gaf_ddp.ballots.ballot import affordable
from gaf_ddp.runtime.collectives import reduced_numbers

SKETCH_SIZE = 4096  # numbers, GAFState's default
WORLD_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Constants:
    """What one machine is measured to do."""

    alpha: float  # seconds per message
    beta: float  # seconds per byte that leaves a host
    gram: float  # seconds per byte of rows
    combine: float  # seconds per byte of rows
    fold: float  # seconds per byte of a bucket
    scale: float  # seconds per byte of a bucket
    decision: dict[int, float]  # seconds by W
    verdict: dict[int, float]  # seconds by W, of tally and draw


@dataclass(frozen=True)
class Cost:
    """Of one bucket: a rank's time and memory, and what leaves its host."""

    seconds: float
    bytes_sent: float
    memory: float  # bytes beside the bucket


def leaving(world: int, ranks_per_host: int) -> float:
    """Return how much more leaves a host of an all-to-all and a ring all-gather than of a ring all-reduce.

    In the all-to-all each of G ranks sends `S/W` to each of W − G elsewhere; of half a ring, one rank sends
    `(W − 1)/W S` on. The ratio of those is `G (W − G)/(W − 1)`: 1 for one rank per host, close to G for many hosts.
    """
    return (1 + ranks_per_host * (world - ranks_per_host) / (world - 1)) / 2


def all_reduce(world: int, size: float, c: Constants) -> Cost:
    """Return the cost of a ring all-reduce."""
    sent = 2 * (world - 1) / world * size
    return Cost(2 * (world - 1) * c.alpha + sent * c.beta, sent, 0.0)


def steps_of_a_ballot(world: int, gradient: float) -> int:
    """Return how many steps go into a ballot where `judge_every` is None, by the gradient's bytes."""
    return affordable(world, SKETCH_SIZE, gradient)


def late(world: int, size: float, c: Constants, steps: int | None = None) -> Cost:
    """Return the cost one step late, of a model of one bucket; steps: of a ballot."""
    reduce, shares = all_reduce(world, size, c), all_reduce(world, 16, c)
    part = 1 / (steps or steps_of_a_ballot(world, size))
    ballots = 4 * SKETCH_SIZE * (world - 1)
    seconds = reduce.seconds + shares.seconds + size * (c.fold + c.scale)
    seconds += part * ((world - 1) * c.alpha + ballots * c.beta + c.verdict[world])
    memory = 8 * world * SKETCH_SIZE  # all ballots, and momenta
    return Cost(seconds, reduce.bytes_sent + shares.bytes_sent + part * ballots, memory)


def sharded(world: int, size: float, c: Constants, ranks_per_host: int = 1) -> Cost:
    """Return the cost of the sharded filter."""
    gramian = all_reduce(world, 8 * (reduced_numbers(world) + world), c)  # and a row of messages
    sent = 2 * (world - 1) / world * size * leaving(world, ranks_per_host)
    travel = 2 * (world - 1) * c.alpha + sent * c.beta
    seconds = travel + gramian.seconds + size * (c.gram + c.combine) + c.decision[world]
    return Cost(seconds, sent + gramian.bytes_sent, size + 8 * world**2)


def sketch(world: int, size: float, c: Constants, ranks_per_host: int = 1) -> Cost:
    """Return the cost of the filter over sketches; scaling is a combine of one row."""
    reduce, gramian = all_reduce(world, size, c), all_reduce(world, 8 * (reduced_numbers(world) + world), c)
    whole = 4 * SKETCH_SIZE * (world - 1) <= 2**18  # as SketchExchange has it
    received = SKETCH_SIZE * 4 * (world if whole else 1)
    sent = received / world * ranks_per_host * (world - ranks_per_host)
    seconds = reduce.seconds + (world - 1) * c.alpha + sent * c.beta + gramian.seconds
    seconds += size * (c.fold + c.combine) + c.decision[world]
    return Cost(seconds, reduce.bytes_sent + sent + gramian.bytes_sent, received + 8 * world**2)


def gather(world: int, size: float, c: Constants) -> Cost:
    """Return the cost of the gather filter; rings both, so that the hosts' size does not matter."""
    reduce, sent = all_reduce(world, size, c), (world - 1) * size
    seconds = (world - 1) * c.alpha + sent * c.beta + reduce.seconds + 8 * world**2 * c.beta + c.alpha
    seconds += world * size * c.gram + size * c.combine + c.decision[world]
    return Cost(seconds, sent + reduce.bytes_sent, world * size + 8 * world**2)


def predict(
    constants: Constants, points: list[dict[str, float]], size: int, ranks_per_host: int
) -> list[dict[str, Any]]:
    """Return one row per W from two hosts on: the model, and what was measured there."""
    rows = []
    for world in (w for w in WORLD_SIZES if w >= 2 * ranks_per_host):
        plain = all_reduce(world, size, constants)
        row: dict[str, Any] = {
            "W": world,
            "all_reduce_ms": plain.seconds * 1e3,
            "decision_us": constants.decision[world] * 1e6,
            "verdict_us": constants.verdict[world] * 1e6,
            "steps_of_a_ballot": steps_of_a_ballot(world, size),
            "measured": next((p for p in points if p["W"] == world), None),
        }
        for name, cost in (
            ("late", late(world, size, constants)),
            ("sketch", sketch(world, size, constants, ranks_per_host)),
            ("sharded", sharded(world, size, constants, ranks_per_host)),
            ("gather", gather(world, size, constants)),
        ):
            row[name] = {
                "time_ratio": cost.seconds / plain.seconds,
                "bytes_ratio": cost.bytes_sent / plain.bytes_sent,
                "memory_buckets": cost.memory / size,
            }
        rows.append(row)
    return rows
