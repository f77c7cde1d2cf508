"""What goes wrong says where."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def named(where: str) -> Iterator[None]:
    """Let what is raised say where: in the text of torch's own errors, as of a lost connection, else in a note.

    Memory that ran out stays an error of its own kind: training loops catch it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise RuntimeError(f"gaf_ddp: {where}: {error}") from error
        if hasattr(error, "add_note"):  # since Python 3.11
            error.add_note(f"gaf_ddp: {where}")
        raise
