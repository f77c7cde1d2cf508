"""Where the hook's work is done: on the CPU in the hook's own call, on an accelerator on a side stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future


class SideStream:
    """A stream beside backward's: the device keeps the order, and the host never waits. On the CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        # Before what backward has enqueued: each of a bucket's launches would wait behind matrix products.
        self._stream = None if self._module is None else self._module.Stream(device, priority=-1)

    def future(self) -> Future[Tensor]:
        """Return an empty future that makes whoever waits for it wait for the device, not the host."""
        return Future(devices=None if self._module is None else [self._device])

    @contextmanager
    def behind_backward(self) -> Iterator[None]:
        """Enqueue what is done inside behind everything on the current stream; autograd records nothing."""
        with torch.no_grad():
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(self._module.current_stream(self._device))
            with self._module.stream(self._stream):
                yield
