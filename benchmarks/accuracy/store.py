"""Finished runs, one JSON line each, found again by their declaration."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.declare import Run, plain
from benchmarks.accuracy.training import Record

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a count of kept ranks is one of these


class Store:
    """The records of finished runs. A line cut short by an interruption is left out, and its run made again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Record] = {}
        text = path.read_text() if path.is_file() else ""
        self._torn = text != "" and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._records[json.dumps(entry["run"], sort_keys=True)] = entry["record"]

    def __contains__(self, run: Run) -> bool:
        return run.key in self._records

    def __getitem__(self, run: Run) -> Record:
        return self._records[run.key]

    def add(self, run: Run, record: Record) -> None:
        """Write a finished run down, at once."""
        counts = "" if run.rule.like else "".join(DIGITS[count] for count in record["counts"])
        numbers = {name: round(v, 4) if isinstance(v, float) else v for name, v in record.items()}
        self._records[run.key] = numbers | {"counts": counts}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"run": plain(run), "record": self._records[run.key]})
        with self._path.open("a") as file:
            file.write("\n" * self._torn + line + "\n")
        self._torn = False

    def counts(self, run: Run) -> Sequence[int]:
        """Return how many ranks a finished run kept at each decision."""
        return [int(digit, 36) for digit in self._records[run.key]["counts"]]
