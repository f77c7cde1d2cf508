"""A log of AgreementLog, read back: its records, and the names of the ranks in them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gaf_ddp.monitor.log_targets import FORMAT, KEY

Record = dict[str, Any]
_NAMES = {"step", "time", "decisions", "ratio", "ranks", "gaf/skipped_fraction"}
_OF_RANK = {"rank", "host", "kept", "distance", "trend", "nonfinite", "overlong", "zero", "flipped"}


class LogError(ValueError):
    """A log that cannot be read, or a report that cannot be made; the message is one line."""


def read(path: Path, growing: bool = False) -> list[Record]:
    """Return a log's records by ascending step; what a restarted job wrote replaces what it went on from.

    A log that is `growing` may end within a line, and may be empty or not there yet: no records then.

    Raises:
        LogError: there is no such file, it is empty, no log, of another version, or a line is incomplete.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        if growing:
            return []
        raise LogError(f"{path} must be a log of AgreementLog: {error.strerror}") from error
    except OSError as error:
        raise LogError(f"{path} must be a log of AgreementLog: {error.strerror}") from error
    if lines == [b""] and not growing:
        raise LogError(f"{path} must be a log of AgreementLog, found an empty file")
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], 1):
        record = _parse(line, f"{path}, line {number},")
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    if lines[-1] and not growing:
        raise LogError(f"{path}, line {len(lines)}, must end: a job that writes there again cuts it off, or delete it")
    size = len(records[-1]["ranks"]) if records else 0
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


def edges(records: Sequence[Record]) -> list[int]:
    """Return the steps between which the records lie, one more than there are; the first is a guess."""
    steps = [record["step"] for record in records]
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0])
    return [max(0, first), *steps]


def name(record: Record, rank: int) -> str:
    """Return a rank's name with its host, if that is known."""
    host = record["ranks"][rank]["host"]
    return f"rank {rank} on {host}" if host else f"rank {rank}"


def title(path: Path, records: Sequence[Record]) -> str:
    """Return what a log is, in a line."""
    if not records:
        return f"{path}: no record yet"
    ranks, step = len(records[-1]["ranks"]), records[-1]["step"]
    return f"{path}: {ranks} ranks, to step {step}, {len(records)} record{'s' * (len(records) > 1)}"
