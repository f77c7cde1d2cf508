"""Records of decisions on their way from an accelerator to the host, which reads them a step later."""

from collections import deque
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.runtime.device import on_host

_FIELDS = [field.name for field in fields(Agreement)]


class Pending:
    """Copies a step's decisions into pinned memory behind the step, in one go; nobody waits for the device."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, list[Agreement], int, Tensor, Any]] = deque()

    def push(self, step: int, decisions: list[Agreement], numbers: Sequence[Tensor]) -> None:
        """Start a step's decisions on their way, with numbers `(W,)` beside each."""
        flat, event = torch.cat([*map(_flat, decisions), *(each.double() for each in numbers)]), None
        if not on_host(flat):
            held = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.device.type != "cpu")
            flat, device = held.copy_(flat, non_blocking=True), flat.device
            if device.type != "cpu":
                event = torch.Event(device)
                event.record(torch.get_device_module(device).current_stream(device))
        self._waiting.append((step, decisions, len(numbers), flat, event))

    def pop(self) -> tuple[int, list[Agreement], list[Tensor]]:
        """Return the oldest step's decisions on the host, with their numbers."""
        step, decisions, numbers, flat, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        read = []
        for each in decisions:
            size = sum(getattr(each, name).numel() for name in _FIELDS if getattr(each, name) is not None)
            own, flat = flat[:size], flat[size:]
            read.append(_shaped(own, each))
        return step, read, list(flat.view(numbers, -1))

    def __len__(self) -> int:
        """Return how many steps are on their way."""
        return len(self._waiting)


def _flat(record: Agreement) -> Tensor:
    values = [getattr(record, name) for name in _FIELDS]
    return torch.cat([value.flatten().double() for value in values if value is not None])


def _shaped(numbers: Tensor, like: Agreement) -> Agreement:
    """Return a record on the host of the same shapes and dtypes."""
    found: dict[str, Tensor] = {}
    for name in _FIELDS:
        value = getattr(like, name)
        if value is not None:
            part, numbers = numbers[: value.numel()], numbers[value.numel() :]
            found[name] = part.view(value.shape).to(value.dtype)
    return replace(like, **found)
