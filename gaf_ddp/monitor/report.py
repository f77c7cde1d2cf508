"""Tell what a log of AgreementLog says: who is out, since when, on which host, why; and draw it.

python -m gaf_ddp.report agreement.jsonl --out agreement.png
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaf_ddp.monitor.reports import over_medians
from gaf_ddp.monitor.sinks import FORMAT, KEY

Record = dict[str, Any]
_NAMES = {"step", "time", "decisions", "ratio", "ranks", "gaf/skipped_fraction"}
_OF_RANK = {"rank", "host", "kept", "distance", "trend", "nonfinite", "overlong", "zero", "flipped"}
_OUT = 0.5  # a rank that is kept less often than this in a record is out


class LogError(ValueError):
    """A log that cannot be read; the message is one line."""


@dataclass(frozen=True)
class Absence:
    """The records, one after the other, in which a rank was out."""

    rank: int
    since: int  # step
    until: int | None  # the last step; None if the rank is out at the end of the log
    why: str


def read(path: Path) -> list[Record]:
    """Return a log's records by ascending step; what a restarted job wrote replaces what it went on from.

    Raises:
        LogError: there is no such file, it is empty, no log, of another version, or a line is incomplete.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LogError(f"{path} must be a log of AgreementLog: {error.strerror}") from error
    if lines == [b""]:
        raise LogError(f"{path} must be a log of AgreementLog, found an empty file")
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], 1):
        record = _parse(line, f"{path}, line {number},")
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    if lines[-1]:
        raise LogError(f"{path}, line {len(lines)}, must end: a job that writes there again cuts it off, or delete it")
    size = len(records[-1]["ranks"])
    return [record for record in records if len(record["ranks"]) == size]  # of a job with other ranks, its last part


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or KEY not in record:
        raise LogError(f"{where} must be a record of AgreementLog, found {line[:40].decode(errors='replace')!r}")
    if record[KEY] != FORMAT:
        raise LogError(f"{where} must be of version {FORMAT}, found {record[KEY]!r}")
    ranks = record.get("ranks")
    if not (record.keys() >= _NAMES and isinstance(ranks, list) and ranks) or not all(
        isinstance(rank, dict) and rank.keys() >= _OF_RANK for rank in ranks
    ):
        raise LogError(f"{where} must hold {sorted(_NAMES)} and of each rank {sorted(_OF_RANK)}")
    return record


def absences(records: Sequence[Record]) -> list[Absence]:
    """Return who was out, since when, and why, by rank."""
    found = []
    for rank in range(len(records[-1]["ranks"])):
        shares = [record["ranks"][rank]["kept"] for record in records]  # None where the rank has finished
        out = [share is not None and share < _OUT for share in shares]
        begin = 0
        while True in out[begin:]:
            begin = out.index(True, begin)
            end = out.index(False, begin) if False in out[begin:] else len(out)
            since, until = edges(records)[begin] + 1, records[end - 1]["step"] if end < len(out) else None
            exact = records[begin]["ranks"][rank].get("out_since")
            if exact is not None and (begin == 0 or exact >= since - 1):
                since = exact
            found.append(Absence(rank, since, until, _why(records[begin:end], rank)))
            begin = end
    return found


def edges(records: Sequence[Record]) -> list[int]:
    """Return the steps between which the records lie, one more than there are; the first is a guess."""
    steps = [record["step"] for record in records]
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0])
    return [max(0, first), *steps]


def _why(records: Sequence[Record], rank: int) -> str:
    """Return why a rank was out in these records: what most of their decisions say."""
    parts = [record["ranks"][rank] for record in records]
    reasons = {
        "nonfinite": "its gradient is not finite",
        "zero": "its gradient is zero",
        "overlong": f"its gradient has a {over_medians(records[-1].get('max_norm_ratio'))}",
        "flipped": "its gradient is turned away from the others'",
    }
    shares = {name: sum(part[name] or 0 for part in parts) / len(parts) for name in reasons}
    likely = max(shares, key=lambda name: shares[name])
    if shares[likely] >= _OUT:
        return reasons[likely]
    known = [part for part in parts if part["distance"] is not None]
    if not known:
        return "it disagrees with those that are kept"
    last, ratio = known[-1], records[-1]["ratio"]
    text = f"it is far from the consensus, z = {last['distance']:.1f}"
    text += f" where {ratio:g} is the limit" if ratio else ""
    return text if last["trend"] is None else f"{text}, {_trend(last['trend'])}"


def _trend(trend: float) -> str:
    return (
        "steady" if abs(trend) < 0.05 else f"{'growing' if trend > 0 else 'falling'} by {abs(trend):.1f} in 100 steps"
    )


def name(record: Record, rank: int) -> str:
    """Return a rank's name with its host, if that is known."""
    host = record["ranks"][rank]["host"]
    return f"rank {rank} on {host}" if host else f"rank {rank}"


def sentences(records: Sequence[Record]) -> list[str]:
    """Return what the log says, a sentence each, the ranks that are out first."""
    last, found = records[-1], absences(records)
    ranks = last["ranks"]
    now = [absence for absence in found if absence.until is None]
    before = [absence for absence in found if absence.until is not None]
    said = [f"{name(last, a.rank).capitalize()} is out since step {a.since}: {a.why}." for a in now]
    said += [f"{name(last, a.rank).capitalize()} was out from step {a.since} to {a.until}: {a.why}." for a in before]
    done = [rank["rank"] for rank in ranks if rank["kept"] is None]
    said += [f"{name(last, rank).capitalize()} has finished: it is out of inputs." for rank in done]
    others = [rank for rank in ranks if rank["rank"] not in [*done, *(a.rank for a in now)]]
    if not now and others:
        least = min(others, key=lambda rank: rank["kept"])
        said.insert(
            0,
            f"No rank is out at step {last['step']}: the least kept is rank {least['rank']}, {least['kept']:.0%}.",
        )
    elif others:
        kept = f"kept in at least {min(rank['kept'] for rank in others):.0%} of the last decisions"
        said.append(f"The other {len(others)} ranks are {kept}." if len(others) > 1 else f"The other one is {kept}.")
    decisions = sum(record["decisions"] for record in records)
    skipped = sum(record["gaf/skipped_fraction"] * record["decisions"] for record in records) / decisions
    if skipped:
        said.append(f"In {skipped:.0%} of all decisions nothing agreed.")
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the sentences, and draw the picture if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m gaf_ddp.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, metavar="LOG", help="a file that AgreementLog wrote")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="a picture to write: .png, .svg or .pdf")
    found = parser.parse_args(arguments)
    try:
        records = read(found.log)
        size, step = len(records[-1]["ranks"]), records[-1]["step"]
        print(f"{found.log}: {size} ranks, to step {step}, {len(records)} records")
        print("\n".join(sentences(records)))
        if found.out:
            _draw(records, found.out)
    except LogError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _draw(records: Sequence[Record], path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise LogError(f"--out must be a .png, .svg or .pdf in an existing folder, found {path}")
    try:
        from gaf_ddp.monitor.plot import draw
    except ImportError as error:
        raise LogError(f"--out needs matplotlib: pip install 'gaf-ddp[report]' ({error})") from error
    draw(records, path)
    print(path)
