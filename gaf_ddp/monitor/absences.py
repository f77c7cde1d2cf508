"""Who was out in a log, from which step to which, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from gaf_ddp.monitor.log_reader import Record, edges
from gaf_ddp.monitor.report import over_medians

OUT = 0.5  # a rank that is kept less often than this in a record is out


@dataclass(frozen=True)
class Absence:
    """The records, one after the other, in which a rank was out."""

    rank: int
    since: int  # step
    until: int | None  # the last step; None if the rank is out at the end of the log
    why: str
    reason: str  # nonfinite, zero, overlong, flipped or far


def absences(records: Sequence[Record]) -> list[Absence]:
    """Return who was out, since when, and why, by rank."""
    found = []
    for rank in range(len(records[-1]["ranks"])):
        shares = [record["ranks"][rank]["kept"] for record in records]  # None where the rank has finished
        out = [share is not None and share < OUT for share in shares]
        begin = 0
        while True in out[begin:]:
            begin = out.index(True, begin)
            end = out.index(False, begin) if False in out[begin:] else len(out)
            since, until = edges(records)[begin] + 1, records[end - 1]["step"] if end < len(out) else None
            exact = records[begin]["ranks"][rank].get("out_since")
            # It may have gone out inside of the record before, which kept it half of the time or more.
            if exact is not None and (begin == 0 or exact >= edges(records)[begin - 1]):
                since = exact
            reason, why = _why(records[begin:end], rank)
            found.append(Absence(rank, since, until, why, reason))
            begin = end
    return found


def _why(records: Sequence[Record], rank: int) -> tuple[str, str]:
    """Return why a rank was out in these records, in a word and in words: what most of their decisions say."""
    parts = [record["ranks"][rank] for record in records]
    reasons = {
        "nonfinite": "its gradient is not finite",
        "zero": "its gradient is zero",
        "overlong": f"its gradient has a {over_medians(records[-1].get('max_norm_ratio'))}",
        "flipped": "its gradient is turned away from the others'",
    }
    shares = {name: sum(part[name] or 0 for part in parts) / len(parts) for name in reasons}
    likely = max(shares, key=lambda name: shares[name])
    if shares[likely] >= OUT:
        return likely, reasons[likely]
    known = [part for part in parts if part["distance"] is not None]
    if not known:
        return "far", "it disagrees with those that are kept"
    last, ratio = known[-1], records[-1]["ratio"]
    text = f"it is far from the consensus, z = {last['distance']:.1f}"
    text += f" where {ratio:g} is the limit" if ratio else ""
    return "far", text if last["trend"] is None else f"{text}, {_trend(last['trend'])}"


def _trend(trend: float) -> str:
    return (
        "steady" if abs(trend) < 0.05 else f"{'growing' if trend > 0 else 'falling'} by {abs(trend):.1f} in 100 steps"
    )
