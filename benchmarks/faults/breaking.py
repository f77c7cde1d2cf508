"""How things are broken, from inside the rank that breaks."""

import functools
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist

import gaf_ddp.ballots.opened
import gaf_ddp.exchange.gather
import gaf_ddp.exchange.pipeline
import gaf_ddp.exchange.sharded
import gaf_ddp.exchange.sketched
import gaf_ddp.hook
from benchmarks.faults.declare import FAULT_STEP, VICTIM, Fault

_SIGNALS = {"kill": signal.SIGKILL, "SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}


class Breaking:
    """Break one thing, once, in step FAULT_STEP; note the time in a file, for those that wait elsewhere.

    Args:
        fault: what and where.
        rank: this one; unless the fault is on all, only VICTIM's breaks.
        noted: the file.
        host: the rank's host and the switch, where ranks have hosts of their own.
    """

    def __init__(self, fault: Fault, rank: int, noted: Path, host: tuple[str, str] | None) -> None:
        self.fault, self.step = fault, 0
        self._noted, self._host = noted, host
        self._is_due = fault.on_all or rank == VICTIM
        if self._is_due and fault.where.split()[0] in ("before", "inside", "after"):
            self._wrap(*fault.where.split())
        if self._is_due and "memory" in fault.what:
            # What first reads a bucket, on either way.
            for module, name in ((gaf_ddp.exchange.pipeline, "gram"), (gaf_ddp.ballots.opened, "fold_into")):
                vars(module)[name] = self._first(vars(module)[name])

    def _first(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def function(*args: Any) -> Any:
            self.now()
            return original(*args)

        return function

    @property
    def is_now(self) -> bool:
        """Whether something is about to break here."""
        return self._is_due and self.step == FAULT_STEP

    def at(self, where: str) -> None:
        """Break if this is the place."""
        if where == self.fault.where and "memory" not in self.fault.what:
            self.now()

    def note(self) -> None:
        """Note when it was."""
        if not self._noted.exists():
            self._noted.write_text(str(time.monotonic()))

    def now(self) -> None:
        """Break, if it is time."""
        if not self.is_now or self.fault.what.startswith(("weighting", "step", "no hook", "loader")):
            return
        self._is_due, what, seconds = False, self.fault.what, self.fault.seconds
        self.note()
        if what == "raise":
            raise RuntimeError("the user's own error in backward")
        if what == "memory":
            raise MemoryError("no memory left")
        if what == "device memory":
            raise torch.OutOfMemoryError("device out of memory")
        if what in ("cut", "slow"):
            self._break_link(what, seconds)
        elif what == "stop":
            if seconds < math.inf:
                subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), _SIGNALS[what])
            time.sleep(0.01)  # signals to the main thread come between two of its instructions

    def _break_link(self, what: str, seconds: float) -> None:
        assert self._host is not None
        host, switch = self._host
        if what == "slow":
            _run(f"tc -n {host} qdisc add dev eth0 root tbf rate 100kbit burst 16kb latency 500ms")
            return
        link = f"ip -n {switch} link set port{VICTIM}"
        _run(f"{link} down")
        if seconds < math.inf:
            Timer(seconds, _run, [f"{link} up"]).start()

    def _wrap(self, moment: str, place: str) -> None:
        late = gaf_ddp.ballots.late.LateFilter
        exchanges = [
            gaf_ddp.exchange.sketched.SketchExchange,
            gaf_ddp.exchange.sharded.ShardedExchange,
            gaf_ddp.exchange.gather.GatherExchange,
        ]
        own = {"average": (gaf_ddp.hook, "_late"), "ballot": (late, "_send"), "verdict": (late, "draw")}
        places: list[tuple[Any, str]] = [own[place]] if place in own else [(kind, place) for kind in exchanges]
        for holder, name in places:
            setattr(holder, name, _breaking(getattr(holder, name), moment, self))

    @contextmanager
    def amid_messages(self) -> Iterator[None]:
        """Break once some of a collective's messages are on their way."""
        if not self.is_now:
            yield
            return
        places = [(dist, "all_reduce"), (dist, "all_to_all_single")]
        gather, sharded = gaf_ddp.exchange.gather, gaf_ddp.exchange.sharded
        modules = gather, sharded, gaf_ddp.exchange.sketched, gaf_ddp.ballots.late
        places += [(module, "all_gather_single") for module in modules]
        originals = [(module, name, getattr(module, name)) for module, name in places]
        for module, name, original in originals:
            setattr(module, name, self._sending(original))
        try:
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)

    def _sending(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def send(*args: Any, **options: Any) -> Any:
            asked = options.pop("async_op", False)
            work = original(*args, **options, async_op=True)
            self.now()
            if not asked:
                work.wait()
            return work

        return send


def _breaking(original: Callable[..., Any], moment: str, breaking: Breaking) -> Callable[..., Any]:
    """Return a method that breaks before, inside or after itself."""

    @functools.wraps(original)
    def method(*args: Any) -> Any:
        if moment == "before":
            breaking.now()
        if moment != "inside":
            result = original(*args)
        else:
            with breaking.amid_messages():
                result = original(*args)
        if moment == "after":
            breaking.now()
        return result

    return method


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
