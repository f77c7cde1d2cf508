"""A side stream of an accelerator: the device keeps the order, and the host never waits."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gaf_ddp.exchange.gather import GatherExchange
from gaf_ddp.exchange.protocol import Exchange
from gaf_ddp.exchange.sharded import ShardedExchange
from gaf_ddp.exchange.sketched import SketchExchange

Promise = Future[Tensor]


class StreamLane:
    """A side stream of an accelerator: the work is enqueued inside the hook, on DDP's own group."""

    small_bytes = 65_536  # in all ranks' buckets, up to which latency is a bucket's time (not measured yet)

    def __init__(
        self, parent: dist.ProcessGroup, device: torch.device, wire_dtype: torch.dtype | None, sketch_size: int
    ) -> None:
        self.group = self.small_messages = parent
        self.gather: Exchange = GatherExchange(parent, wire_dtype)
        self.sharded: Exchange = ShardedExchange(parent, wire_dtype)
        self.sketch = SketchExchange(parent, sketch_size, wire_dtype)
        self._device = device
        self._module = torch.get_device_module(device)
        # Before what backward has enqueued: each of a bucket's launches would wait behind matrix products.
        self._stream = self._module.Stream(device, priority=-1)

    def promise(self) -> Promise:
        """Return an empty future that makes whoever waits for it wait for the device, not the host."""
        return Future(devices=[self._device])

    def run(self, work: Callable[[], None], awaited: bool = True) -> None:
        """Enqueue the work behind everything on the current stream."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream), torch.no_grad():
            work()

    def when_idle(self, work: Callable[[], None]) -> None:
        """Do nothing: on a stream nothing is left over."""

    def wait(self) -> None:
        """Return at once: the device waits, and what went wrong was raised in `run`."""

    def result(self, promise: Promise) -> Promise:
        """Return the promise."""
        return promise
