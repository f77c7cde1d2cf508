"""The arms of others' rules: what each is told of the bad ranks, and where it allows no such number, no run."""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.accuracy.declare import Experiment, Rule, Run

Runs = Callable[[Experiment], list[Run]]


def told(name: str) -> Runs:
    """Return the run of a rule that is told how many ranks are bad, 1 where none is; they must be a minority."""

    def runs(e: Experiment) -> list[Run]:
        bad = max(len(e.bad), 1)
        return [replace(e.base, rule=Rule(name, float(bad)))] if len(e.base.ranks) > 2 * bad else []

    return runs


def krum(e: Experiment) -> list[Run]:
    """Return Krum's run, told how many ranks are bad (1 where none is); it needs three more than those."""
    bad = max(len(e.bad), 1)
    return [replace(e.base, rule=Rule("krum", float(bad)))] if len(e.base.ranks) >= bad + 3 else []


def mixing(bad: Callable[[Experiment], int]) -> Runs:
    """Return the run of ByzFL's mixing told of so many bad ranks; none where it allows no such number.

    Told of none, it is averaging.
    """

    def runs(e: Experiment) -> list[Run]:
        allowed = 0 < bad(e) < len(e.base.ranks) / 2
        return [replace(e.base, rule=Rule("mixing", float(bad(e))))] if allowed else []

    return runs


def most(e: Experiment) -> int:
    """Return the largest number of bad ranks that mixing allows; 0 where an arm tells it the same."""
    count = (len(e.base.ranks) - 1) // 2
    return count if count > len(e.bad) + 1 else 0


def clipping(e: Experiment) -> list[Run]:
    """Return centred clipping's runs, of which the best radius is chosen."""
    return [replace(e.base, rule=Rule("clipping", radius)) for radius in (0.1, 1.0, 10.0)]
