"""What people are told of the ranks, as text and as plain dictionaries."""

from dataclasses import asdict, dataclass
from typing import Any


def over_medians(ratio: float | None) -> str:
    """Return in words that a norm is over so many medians, or far over the median where the limit is not known."""
    return "norm far over the median" if ratio is None else f"norm over {ratio:g} medians"


@dataclass(frozen=True)
class RankStanding:
    """One rank. Counts are of decisions; a step leaves a rank out if most of its decisions gave it no weight.

    A step on which nothing agreed leaves nobody out, and no step leaves out a rank that has finished.

    Attributes:
        host: the name of its machine; empty before the first bucket.
        kept: share of decisions in which it was kept, of those for which it had not finished; None without any.
        distance: mean z of the last 100 steps or so, each at most 100; None for rules that know none.
        trend: how much that changes in 100 steps; None before it was judged in some 50.
        nonfinite, overlong, zero, flipped: decisions in which its gradient was not finite, longer than
            `max_norm_ratio` medians, zero, or turned away from the others'.
        finished: decisions for which it waited in DDP's Join, out of inputs.
        first_out: the first step that left it out, None if none did.
        out_since: the step since which every one left it out, None if the last one did not.
        longest_out: the most steps in a row that did.
        trusted_since: the step since which held-out data speak for it: it is kept however far it is. Or None.
        condemned_since: the step since which they speak against it: it is left out. Or None.
    """

    rank: int
    host: str
    kept: float | None
    distance: float | None
    trend: float | None
    nonfinite: int
    overlong: int
    zero: int
    flipped: int
    finished: int
    first_out: int | None
    out_since: int | None
    longest_out: int
    trusted_since: int | None = None
    condemned_since: int | None = None

    def __str__(self) -> str:
        """Return one line."""
        return self.line(None)

    def line(self, max_norm_ratio: float | None) -> str:
        """Return one line, with the limit of a norm in medians if it is known."""
        line = f"rank {self.rank}{f' on {self.host}' if self.host else ''}: "
        line += "finished from the start" if self.kept is None else f"kept {100 * self.kept:.0f} %"
        if self.distance is not None:
            line += f", z {self.distance:.1f}"
        if self.trend is not None:
            line += f" ({self.trend:+.1f} in 100 steps)"
        counts = {
            "not finite": self.nonfinite,
            over_medians(max_norm_ratio): self.overlong,
            "zero": self.zero,
            "turned away": self.flipped,
            "finished": 0 if self.kept is None else self.finished,
        }
        line += "".join(f", {name} {count} time{'s' * (count > 1)}" for name, count in counts.items() if count)
        if self.out_since is not None:
            line += f", out since step {self.out_since}"
        if self.condemned_since is not None:
            line += f", condemned at step {self.condemned_since}: its data raise the held-out loss"
        if self.trusted_since is not None:
            line += f", trusted since step {self.trusted_since}: its data lower the held-out loss"
        return line


_GIVE = "give the filter held-out data (state.reference)"
_MORE = "held-out data say nothing of it yet, give more of them"


@dataclass(frozen=True)
class Report:
    """Where each rank stands after so many steps, by so many decisions; `str` names the ranks that matter."""

    step: int
    decisions: int
    ranks: list[RankStanding]
    max_norm_ratio: float | None = None  # the state's
    watch: bool = False  # the state's
    is_consensus: bool = True  # whether the consensus rule judged, or tau or a weighting
    has_held_out: bool = False  # whether held-out data have been read

    def as_dict(self) -> dict[str, Any]:
        """Return the same in plain dictionaries, as JSON can hold them."""
        return asdict(self)

    def line(self, rank: RankStanding) -> str:
        """Return what there is to say of a rank, in one line."""
        return rank.line(self.max_norm_ratio)

    def out_for(self, steps: int) -> list[RankStanding]:
        """Return who has been out for at least so many steps in a row, up to now."""
        return [each for each in self.ranks if each.out_since is not None and self.step - each.out_since >= steps]

    def __str__(self) -> str:
        """Return a line for each rank that is out or of which there is something to say, and last what to do."""
        out = self.out_for(10)
        kept = {each.rank: 1.0 if each.kept is None else each.kept for each in self.ranks}
        told = [each for each in self.ranks if each.trusted_since is not None or each.condemned_since is not None]
        matter = [e for e in self.ranks if e in out or e in told or kept[e.rank] < 0.9 or e.nonfinite]
        first = f"step {self.step}, {self.decisions} decision{'s' * (self.decisions != 1)}, {len(self.ranks)} ranks"
        if not matter:
            return f"{first}: all are kept" if self.decisions else first
        lines = [f"  {self.line(e)}" for e in sorted(matter, key=lambda e: kept[e.rank])]
        return "\n".join([f"{first}:", *lines, *self.advice()])

    def advice(self) -> list[str]:
        """Return what to do next, a sentence or two each; nothing where all are kept."""
        out = self.out_for(10)
        bad = [each.rank for each in out if each.condemned_since is not None]
        unclear = [each.rank for each in out if each.rank not in bad and not each.nonfinite and not each.zero]
        said = []
        if bad:
            said.append(f"Held-out data speak against {_ranks(bad)}: look at {_theirs(bad)}.")
        if unclear and not self.is_consensus:
            said.append(f"The others do not agree with {_ranks(unclear)}: look at {_theirs(unclear)}.")
        elif unclear:
            may_be = f"{_ranks(unclear).capitalize()} may be broken, or honest with data of its own"
            said.append(f"{may_be}: {_MORE if self.has_held_out else _GIVE}, or look at {_theirs(unclear)}.")
        if spoilt := [each.rank for each in self.ranks if each.nonfinite]:
            said.append(f"NaN or infinity came from {_ranks(spoilt)}: look at the loss scale and the device there.")
        kept = [each.kept for each in self.ranks if each.kept is not None]
        if not self.is_consensus and kept and max(kept) < 0.5:
            said.append("No rank was kept in half of the decisions: raise tau, or the batch size per rank.")
        if out and self.watch:
            who = _ranks([each.rank for each in out])
            said.append(f"Watching only, everyone is averaged: state.watch = False leaves out {who}.")
        if len(self.ranks) == 2 and self.is_consensus:
            said.append("Two ranks cannot outvote each other: nobody is left out for what its gradient says.")
        return said


def _theirs(ranks: list[int]) -> str:
    return "its data and its device" if len(ranks) == 1 else "their data and their devices"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@dataclass(frozen=True)
class RankAudit:
    """One rank in an audit.

    Attributes:
        host: the name of its machine.
        equal: whether its gradient is the reference's, to the bit.
        difference: |gradient − reference| / |reference|, inf where either is not finite.
        parameter: where it differs most, None where it does not.
    """

    rank: int
    host: str
    equal: bool
    difference: float
    parameter: str | None


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; the reference is the majority's gradient, or without one rank 0's."""

    has_majority: bool
    ranks: list[RankAudit]

    @property
    def equal(self) -> bool:
        """Whether all ranks have the same gradient, to the bit."""
        return all(each.equal for each in self.ranks)

    def as_dict(self) -> dict[str, Any]:
        """Return the same in plain dictionaries."""
        return {"equal": self.equal, **asdict(self)}

    def require_equal(self) -> None:
        """Raise RuntimeError, which names the ranks that differ, unless all are equal."""
        if not self.equal:
            raise RuntimeError(f"gradients of one batch must be the same on every rank, found {self}")

    def __str__(self) -> str:
        """Return one line."""
        if self.equal:
            return f"the same gradient on all {len(self.ranks)} ranks"
        different = [
            f"rank {each.rank} ({each.host}) off by {each.difference:.1e}, most in {each.parameter}"
            for each in self.ranks
            if not each.equal
        ]
        return "; ".join(different) + ("" if self.has_majority else "; no majority, relative to rank 0")
