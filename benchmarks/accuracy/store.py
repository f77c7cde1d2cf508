"""Finished runs, one JSON line each, found again by the hash of their declaration."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from benchmarks.accuracy.declare import Run
from benchmarks.accuracy.training import Record

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a count of kept ranks is one of these


class Store:
    """The records of finished runs. A line cut short by an interruption is left out, and its run made again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Record] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._records[entry["key"]] = entry["record"]

    def __contains__(self, run: Run) -> bool:
        return run.key in self._records

    def __getitem__(self, run: Run) -> Record:
        return self._records[run.key]

    def add(self, run: Run, record: Record) -> None:
        """Keep a finished run, at once."""
        counts = "" if run.rule.like else "".join(DIGITS[count] for count in record["counts"])
        kept = {name: round(v, 4) if isinstance(v, float) else v for name, v in record.items()} | {
            "counts": counts
        }
        self._records[run.key] = kept
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if self._torn(file):
                file.write(b"\n")
            line = {"key": run.key, "run": run.plain(), "record": kept}
            file.write(json.dumps(line).encode() + b"\n")

    def counts(self, run: Run) -> Sequence[int]:
        """How many ranks a finished run kept at each decision."""
        return [DIGITS.index(digit) for digit in self._records[run.key]["counts"]]

    @staticmethod
    def _torn(file: BinaryIO) -> bool:
        """Whether an interruption left the last line without its end."""
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
