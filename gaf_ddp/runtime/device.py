"""What a device can do: let the host read its memory at once, work on a stream of its own, and run fused kernels."""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_HOST = "cpu"  # what is no accelerator: the one place to change for tests of the accelerators' way without one


def on_host(tensor: Tensor) -> bool:
    """Return whether the host may read the tensor at once: on an accelerator it would wait for the device."""
    return tensor.device.type == _HOST


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Return numbers that are on the host on the device, without waiting for it."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def require_device(tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor, some of the model's gradients, is on the device that the others are on."""
    if tensor.device != device:
        raise ValueError(f"all parameters of a rank's model must be on one device, found {device} and {tensor.device}")


@cache
def side_stream(device: torch.device) -> Any:
    """Return an accelerator's one stream for what backward need not wait for."""
    return torch.get_device_module(device).Stream(device)


def beside_backward(device: torch.device) -> AbstractContextManager[Any]:
    """Return within what an accelerator's current stream is `side_stream`; nothing changes on the host."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(device).stream(side_stream(device))
    return context


def read_here(tensor: Tensor) -> None:
    """Keep the memory of an accelerator's tensor, made on another stream, until the current one has read it."""
    if tensor.device.type != "cpu":
        tensor.record_stream(torch.get_device_module(tensor.device).current_stream(tensor.device))


@cache
def kernels(device_type: str, name: str = "gram_triton") -> ModuleType | None:
    """Return the module of that name in gaf_ddp.kernels, or None where plain torch does the work.

    Triton's kernels run on NVIDIA GPUs where Triton is installed and can compile; the environment variable
    `GAF_DDP_TRITON=0` turns them off. All ranks should have them, or none.
    """
    return import_module(f"gaf_ddp.kernels.{name}") if _has_kernels(device_type) else None


@cache
def _has_kernels(device_type: str) -> bool:
    if device_type != "cuda" or torch.version.hip is not None or os.environ.get("GAF_DDP_TRITON") == "0":
        return False
    try:
        fused = import_module("gaf_ddp.kernels.gram_triton")
    except ImportError:
        return False
    try:
        fused.probe(torch.device(device_type))
    except Exception as error:  # whatever its compiler may raise: none of it need stop training
        warnings.warn(f"gaf_ddp: Triton cannot compile here, plain torch does its work: {error}", stacklevel=2)
        return False
    return True
