"""The ways that `fold`, `scale` and `correct` go: on a CPU, in plain torch on accelerators, and in Triton."""

from importlib import import_module

import pytest
import torch

from tests.kernels.interpreter import DEVICE, HAS_TRITON, INTERPRETED, ON_GPU

WITH_TRITON = ["triton"] if HAS_TRITON and (INTERPRETED or ON_GPU) else []
# The interpreter's process has its own way only, the others are not its business.
WAYS = WITH_TRITON if INTERPRETED else ["cpu", "accelerator", *WITH_TRITON]


def take(way: str, module: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Let a module of gaf_ddp.kernels go this way, and return the device it wants its tensors on."""
    if way == "cpu":
        return torch.device("cpu")
    if way == "triton":
        fused = import_module(f"gaf_ddp.kernels.{module}_triton")
        monkeypatch.setattr(f"gaf_ddp.kernels.{module}.kernels", lambda *_: fused)
        return DEVICE
    monkeypatch.setattr(f"gaf_ddp.kernels.{module}.kernels", lambda *_: None)
    monkeypatch.setattr("gaf_ddp.runtime.device._HOST", "no device")
    return DEVICE
