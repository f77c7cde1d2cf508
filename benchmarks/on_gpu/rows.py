"""What a job found, in a file that is whole after every row: what was found before a crash is not lost."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """A job's rows, notes and errors.

    Args:
        path: the file; None where another rank writes it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.errors: list[str] = []

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.write()

    def note(self, text: str) -> None:
        """Keep a sentence that stands below the table."""
        self.notes.append(text)
        self.write()

    def fail(self, text: str) -> None:
        """Keep what went wrong."""
        self.errors.append(text)
        self.write()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Write an exception of what is done inside down as an error of that name, and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {said_by(error)}")

    def write(self) -> None:
        """Write the file anew, at once or not at all."""
        if self._path is not None:
            told = {"rows": self.rows, "notes": self.notes, "errors": self.errors}
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(told))
            os.replace(new, self._path)


def read_rows(path: Path) -> Rows:
    """Return what a job wrote, empty where it wrote nothing."""
    found = Rows(None)
    if path.exists():
        told = json.loads(path.read_text())
        found.rows, found.notes, found.errors = told["rows"], told["notes"], told["errors"]
    return found


def said_by(error: BaseException) -> str:
    """Return an error's type and the beginning of what it says, in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"
