"""Running the hook's work beside backward, in bucket order on every rank.

Collectives must be issued in the same order everywhere. On gloo, callbacks run in any order, and DDP uses its
own group meanwhile, so the work goes through one thread with groups of its own. On an accelerator the work
is enqueued at once, in the hook, on a side stream: the device keeps the order and the host never waits.
"""

from collections.abc import Callable
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.futures import Future

from gaf_ddp.exchange import MOST_SWAPPING

Promise = Future[Tensor]


class ThreadLane:
    """One worker thread with its own process groups, for groups whose collectives block the host.

    An exception in the work reaches the user out of `backward()`, with its traceback. After it the lane is
    closed: this rank is out of step with the others, which end by the group's time-out.
    """

    def __init__(self, parent: dist.ProcessGroup, device: torch.device) -> None:
        self.group = _sibling_group(parent, device)
        # Swapped Gramians have connections of their own: behind megabytes of gradients they would wait.
        few = parent.size() <= MOST_SWAPPING
        self.small_messages = _sibling_group(parent, device) if few else self.group
        # A new thread does not know of set_num_threads: matrix products would wake a second thread per core.
        self._executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="gaf_ddp",
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )
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
        """Queue the work.

        If awaited, the end of backward waits for it, before DDP looks at any promise, and raises what it raised.
        If not, DDP waits for the promises alone, and quotes in a RuntimeError what the work raised.
        """
        task = self._executor.submit(self._guarded, work)
        if not awaited:
            return
        try:
            Variable._execution_engine.queue_callback(partial(self._finish, task))
        except RuntimeError:  # not inside backward: DDP's Join shadows the hook of a rank that ran out of inputs
            self._finish(task)

    def result(self, promise: Promise) -> Promise:
        """Return what DDP is to wait for: the promise, or the error in its place."""
        return promise.then(self._checked)

    def _guarded(self, work: Callable[[], None]) -> None:
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

    def _finish(self, task: Task[None]) -> None:
        task.result()
        self._raise_error()

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


class StreamLane:
    """A side stream of an accelerator: the work is enqueued inside the hook, on DDP's own group."""

    def __init__(self, parent: dist.ProcessGroup, device: torch.device) -> None:
        self.group = self.small_messages = parent
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def promise(self) -> Promise:
        """Return an empty future that makes whoever waits for it wait for the device, not the host."""
        return Future(devices=[self._device])

    def run(self, work: Callable[[], None], awaited: bool = True) -> None:
        """Enqueue the work behind everything on the current stream."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream), torch.no_grad():
            work()

    def result(self, promise: Promise) -> Promise:
        """Return the promise: what went wrong in the work was raised at once."""
        return promise


Lane = ThreadLane | StreamLane


def open_lane(parent: dist.ProcessGroup, device: torch.device) -> Lane:
    """Return the lane for buckets on this device; the first call on a CPU is a collective of the parent group."""
    return ThreadLane(parent, device) if device.type == "cpu" else StreamLane(parent, device)


def _sibling_group(parent: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Return a new group of the parent's ranks, backend and time-out (`new_group` alone takes the default's)."""
    ranks = dist.get_process_group_ranks(parent)
    backends = dict(pair.split(":") for pair in dist.get_backend_config(parent).split(","))
    backend: Any = parent._get_backend(device)
    timeout: timedelta = backend.options._timeout
    group = dist.new_group(
        ranks,
        timeout=timeout,
        backend=backends[device.type],
        use_local_synchronization=len(ranks) < dist.get_world_size(),
        group_desc="gaf_ddp",
    )
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    return group
