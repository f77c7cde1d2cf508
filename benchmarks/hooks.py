"""The hooks that a training step is measured with: DDP's own, its peers, and the filter's variants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp import GAFState, gaf_hook

READS_EVERY = 20  # steps


@dataclass(frozen=True)
class Hook:
    """One way to average gradients."""

    register: Callable[[DistributedDataParallel], None]
    one_bucket: bool = False
    note: str = ""
    state: GAFState | None = None  # of a hook that held-out data are read with


def hooks() -> dict[str, Hook]:
    """Return every hook by name; `ddp`, the baseline, is none."""
    gloo = dist.get_backend() == "gloo"
    named = {
        "ddp": Hook(lambda model: None, note="no hook"),
        "noop": _plain(debugging_hooks.noop_hook, note="sends nothing: the head-room"),
        "allreduce": _plain(default_hooks.allreduce_hook),
        "fp16": _plain(default_hooks.fp16_compress_hook),
        "bf16": _plain(default_hooks.bf16_compress_hook),
        # On gloo PowerSGD reorders its collectives between ranks when there are several buckets, and dies.
        "powersgd": Hook(_power_sgd, one_bucket=gloo, note="rank 1" + ", one bucket" * gloo),
    }
    named["gaf"] = _gaf(note="GAFState(): one step late")
    named["gaf-watch"] = _gaf(note="judges, averages everyone", watch=True)
    named["gaf-held-out"] = _reading()
    named["gaf-bf16"] = _gaf(wire_dtype=torch.bfloat16)
    for scope in ("bucket", "model"):
        for exchange in ("sharded", "gather"):
            named[f"gaf-{scope}-{exchange}"] = _gaf(tau=1.0, scope=scope, exchange=exchange)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            named[f"gaf-{scope}-{name}"] = _gaf(tau=1.0, scope=scope, exchange="sharded", wire_dtype=dtype)
    return named


def wrap(hook: Hook, model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return the model under DDP with the hook."""
    devices = [device] if device.type == "cuda" else None
    cap = 10_000.0 if hook.one_bucket else None
    wrapped = DistributedDataParallel(model, device_ids=devices, bucket_cap_mb=cap)
    hook.register(wrapped)
    return wrapped


def _plain(hook: Any, note: str = "") -> Hook:
    return Hook(lambda model: model.register_comm_hook(None, hook), note=note)


def _gaf(note: str = "", **settings: Any) -> Hook:
    return Hook(lambda model: model.register_comm_hook(GAFState(**settings), gaf_hook), note=note)


def _reading() -> Hook:
    state = GAFState()
    note = f"and a batch of held-out data every {READS_EVERY} steps"
    return Hook(lambda model: model.register_comm_hook(state, gaf_hook), note=note, state=state)


def _power_sgd(model: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
