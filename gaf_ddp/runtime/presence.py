"""Who is there, before the first collective."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_logger = logging.getLogger(__name__)
_TAG = 26_465  # apart from the user's own messages in the same group


def wait_for_everyone(group: dist.ProcessGroup) -> None:
    """Wait until every rank of a CPU group has come this far; sends one byte to each.

    Raises:
        RuntimeError: names a rank that died or did not come. A collective would name an address at best.
    """
    rank, size = group.rank(), group.size()
    others = [(rank + step) % size for step in range(1, size)]
    tokens = torch.zeros(size, 1, dtype=torch.uint8)
    works: list[tuple[int, dist.Work | None]] = []
    for other in others:
        with _naming(rank, other):
            works.append((other, dist.irecv(tokens[other], group=group, group_src=other, tag=_TAG)))
    for other in others:
        with _naming(rank, other):
            works.append((other, dist.isend(tokens[rank], group=group, group_dst=other, tag=_TAG)))
    for other, work in works:
        with _naming(rank, other):
            if work is not None:
                work.wait()


@contextmanager
def told_after(seconds: float, what: str) -> Iterator[None]:
    """Say in the log that this still waits after so many seconds; nobody would see why a job stands still."""
    said = "gaf_ddp: %s, for %.0f s now: is the hook, or the filter, on every rank?"
    timer = threading.Timer(seconds, _logger.warning, (said, what, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _naming(rank: int, other: int) -> Iterator[None]:
    """Let what is raised on a message between two ranks name them."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank} lost rank {other}: {error}") from error
