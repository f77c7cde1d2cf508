"""A thread beside backward, for CPU groups: their collectives block the host, and must keep the buckets' order."""

import atexit
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread, current_thread

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gaf_ddp.exchange.gather import GatherExchange
from gaf_ddp.exchange.groups import open_siblings
from gaf_ddp.exchange.point_to_point import PeerExchange
from gaf_ddp.exchange.protocol import Exchange
from gaf_ddp.exchange.sketched import SketchExchange

Promise = Future[Tensor]
_IDLE = 0.02  # seconds without a bucket after which averages are waited for: a hook around ours may wait for one
_PATIENCE = 5.0  # seconds; without it 3 of 18 processes that ended while the thread worked aborted, with it 0 of 96
_Tasks = SimpleQueue[Callable[[], None] | None]


class ThreadLane:
    """One worker thread with its own process groups, for groups whose collectives block the host.

    An exception in the work reaches the user out of `backward()`, with its traceback. After it the lane is
    closed: this rank is out of step with the others, which end by the group's time-out.
    """

    small_bytes = 0  # gathering never won at W = 4; at W = 2 it did up to 1 MB, where a bucket takes 0.1 to 3 ms

    def __init__(
        self, parent: dist.ProcessGroup, device: torch.device, wire_dtype: torch.dtype | None, sketch_size: int
    ) -> None:
        self.group, self.small_messages = open_siblings(parent, device, self)
        self.gather: Exchange = GatherExchange(self.group, wire_dtype)
        self.sharded: Exchange = PeerExchange(self.group, wire_dtype, self.small_messages)
        self.sketch = SketchExchange(self.group, sketch_size, wire_dtype, self.small_messages)
        self._tasks: _Tasks = SimpleQueue()
        # A daemon, since a rank that failed must be able to leave while the thread waits for ranks that go on.
        idle = self._idle = _Idle()
        arguments = self._tasks, torch.get_num_threads(), idle
        thread = Thread(target=_serve, args=arguments, name="gaf_ddp", daemon=True)
        thread.start()
        atexit.register(_leave, self._tasks, thread)
        weakref.finalize(self, self._tasks.put, None).atexit = False
        self._awaited = Event()
        self._awaited.set()
        self._error: BaseException | None = None
        self._told = False  # whether the error itself has been raised to the user
        self._promises: list[Promise] = []

    def promise(self) -> Promise:
        """Return an empty future that is completed by the work, or by the lane when the work fails.

        Raises what the work raised if nobody was told yet, RuntimeError after that.
        """
        self._raise_error()
        self._promises = [p for p in self._promises if not p.done()]
        self._promises.append(Future())
        return self._promises[-1]

    def run(self, work: Callable[[], None], awaited: bool = True) -> None:
        """Queue the work; if awaited, `wait` waits for it, and else DDP for the promises alone."""
        done = Event()
        self._tasks.put(partial(self._guarded, work, done))
        if awaited:
            self._awaited = done

    def when_idle(self, work: Callable[[], None]) -> None:
        """Let the thread do this when no bucket has come for a while; of a bound method, while its owner lives."""
        self._idle.work = weakref.WeakMethod(work)
        self._idle.guard = weakref.WeakMethod(self._guarded)

    def wait(self) -> None:
        """Wait for the awaited work, and raise what went wrong: DDP would quote it only, in a RuntimeError."""
        self._awaited.wait()
        self._raise_error()

    def result(self, promise: Promise) -> Promise:
        """Return what DDP is to wait for: the promise, or the error in its place."""
        return promise.then(self._checked)

    def _guarded(self, work: Callable[[], None], done: Event) -> None:
        try:
            if self._error is None:
                with torch.no_grad():
                    work()
        except BaseException as error:
            self._error = error
        if self._error is not None:
            for promise in self._promises:
                if not promise.done():
                    promise.set_result(torch.empty(0))
        done.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            told, self._told = self._told, True
            if told:
                message = "this rank left the others at an earlier error; restart the job"
                raise RuntimeError(message) from self._error
            raise self._error

    def _checked(self, promise: Promise) -> Tensor:
        if self._error is not None:
            raise self._error
        return promise.value()


class _Idle:
    """What a lane's thread does when no bucket has come for a while."""

    work: Callable[[], Callable[[], None] | None] | None = None
    guard: Callable[[], Callable[..., None] | None] | None = None

    def do(self) -> None:
        """Do it, if its owner still lives."""
        work, guard = self.work and self.work(), self.guard and self.guard()
        if work is not None and guard is not None:
            guard(work, Event())


def _serve(tasks: _Tasks, threads: int, idle: _Idle) -> None:
    # A new thread does not know of set_num_threads: matrix products would wake a second thread per core.
    torch.set_num_threads(threads)
    busy = False
    while True:
        try:
            task = tasks.get(timeout=_IDLE if busy else None)
        except Empty:
            idle.do()
            busy = False
            continue
        if task is None:
            return
        task()
        busy = True
        del task  # else the lane lived until the next one


def _leave(tasks: _Tasks, thread: Thread) -> None:
    """Let the thread finish before the interpreter ends, but do not wait for ranks that do not come."""
    tasks.put(None)
    if thread is not current_thread():
        thread.join(_PATIENCE)
