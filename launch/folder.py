"""The folder of a job: one job at a time writes there, and its files are whole or not there."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from launch.errors import SettingsError


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise `SettingsError` where the folder cannot be written: it is full, read-only, or none."""
    try:
        yield
    except OSError as error:
        rule = "--out must be a folder this job can write"
        raise SettingsError(f"{rule}, found {folder} ({error.strerror or error})") from error


def claim(folder: Path) -> IO[bytes]:
    """Make the folder this process's own until it closes the file returned, or ends in whatever way."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    try:
        # Not flock: loader workers would inherit it, and outlive a rank that was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network folders have no locks.
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise SettingsError(f"--out must be a folder no other job is writing, found {folder}") from error
    return file


def write_whole(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file beside its place, then move it there; what was there becomes `previous`, if that is given."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
