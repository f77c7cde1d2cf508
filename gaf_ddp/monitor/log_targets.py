"""Where AgreementLog's records go: a file of JSON lines, TensorBoard, a callable that takes a dict."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gaf_ddp.monitor.cosines import picture
from gaf_ddp.settings import require

KEY, FORMAT = "gaf_ddp_log", 1  # what a record begins with: it tells a log from other files
_BEGIN = f'{{"{KEY}"'.encode()

_logger = logging.getLogger(__name__)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's numbers by the names that `GAFState.summary` has; what is unknown is left out."""
    found = {name: value for name, value in record.items() if name.startswith("gaf/")}
    for name in ("kept", "distance", "trend"):
        found |= {f"gaf/{name}_rank_{rank['rank']:02d}": rank[name] for rank in record["ranks"]}
    return {
        "gaf/step": float(record["step"]),
        **{name: value for name, value in found.items() if value is not None},
    }


def writing(target: Any) -> Callable[[dict[str, Any]], None]:
    """Return what writes a record to the target."""
    if isinstance(target, (str, os.PathLike)):
        return _JsonLines(Path(target)).write
    if hasattr(target, "add_scalar") and hasattr(target, "add_image"):
        return _TensorBoard(target).write
    if callable(target):
        return lambda record: target(scalars(record))
    raise TypeError(f"a target must be a path, a SummaryWriter or a callable, found {type(target).__name__}")


class _JsonLines:
    """A file of records. What a killed job left of a line makes room for the next one."""

    def __init__(self, path: Path) -> None:
        fine = path.parent.is_dir() and not path.is_dir()
        require(fine, "a log must be a file in an existing folder", str(path))
        if path.exists():
            with path.open("rb") as file:
                begin = file.read(len(_BEGIN))
            require(
                begin == _BEGIN[: len(begin)],
                f"{path} must be a log to append to, found a file that begins",
                begin,
            )
        self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; a disk that is full costs the line, and not the training."""
        try:
            with self._path.open("ab+") as file:
                _drop_incomplete_line(file)
                file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        except OSError as error:
            _logger.warning("gaf_ddp: step %d is missing in the log %s: %s", record["step"], self._path, error)


class _TensorBoard:
    """A SummaryWriter-like object; hosts are a text, written when they change."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._hosts: list[str | None] = []

    def write(self, record: dict[str, Any]) -> None:
        """Add the record's numbers, and its cosines as a picture."""
        step, hosts = record["step"], [rank["host"] for rank in record["ranks"]]
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        if record["cosine"] is not None:
            self._writer.add_image("gaf/cosine", picture(record["cosine"]), step)
        if hosts != self._hosts and hasattr(self._writer, "add_text"):
            rows = [f"| {rank} | {host} |" for rank, host in enumerate(hosts)]
            self._writer.add_text("gaf/hosts", "\n".join(["| rank | host |", "|---|---|", *rows]), step)
            self._hosts = hosts


def _drop_incomplete_line(file: BinaryIO) -> None:
    """Cut off what follows the last end of a line, if anything does."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if end and file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
