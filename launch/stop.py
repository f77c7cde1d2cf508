"""Leaving in time: a job that is sent SIGTERM saves a checkpoint and ends, all ranks after the same step."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

# What a shell says of a process that SIGTERM ended; Kubernetes' controllers take codes over 127 for worth a retry.
EXIT_CODE = 128 + signal.SIGTERM


class Stopped(Exception):
    """Raised on every rank once the checkpoint is written; says where the job can go on."""


class Stop:
    """Whether any rank has been sent SIGTERM, as a context: outside of it, SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self._sent = False
        self._anyone = torch.zeros(())
        self._work: dist.Work | None = None

    def __enter__(self) -> "Stop":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def agreed(self) -> bool:
        """Return whether a rank had been sent SIGTERM one call ago: the same on every rank, and no one waits."""
        if self._work is not None:
            self._work.wait()
        stop = bool(self._anyone)
        self._anyone = torch.tensor(float(self._sent))
        self._work = dist.all_reduce(self._anyone, dist.ReduceOp.MAX, async_op=True)
        return stop

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._sent = True
