"""Stage 3: what the hook launches and how long the host is in it, bucket by bucket."""

import re
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import synchronize
from benchmarks.on_gpu.job import Job, join_group
from benchmarks.on_gpu.rows import Row
from benchmarks.step_time import build
from gaf_ddp import GAFState, gaf_hook

_LAUNCH = re.compile(r"^(cuda|cu|hip)(Launch|GraphLaunch|Memcpy|Memset)")  # as the profiler names calls of the host
_HOOK, _BACKWARD = "gaf bucket", "gaf backward"
_STEPS, _WARMUP = 20, 6
_BATCH = 8


class Event(NamedTuple):
    """What the profiler saw on the host, in microseconds."""

    name: str
    begin: float
    end: float


def run(job: Job) -> None:
    """Measure DDP without a hook, with torch's own, and with the filter's default way."""
    join_group(job.device)
    name, size, batch = ("transformer", 8, 1) if job.rehearse else (job.part, 224, _BATCH)
    inputs = torch.randn(batch, *build(name, size)[1], device=job.device)
    ways: dict[str, tuple[Any, Any]] = {
        "no hook": (None, None),
        "torch's allreduce_hook": (None, default_hooks.allreduce_hook),
        "GAFState()": (GAFState(), gaf_hook),
    }
    for way, (state, hook) in ways.items():
        with job.rows.attempt(way):
            job.rows.add({"way": way, **measure(build(name, size)[0].to(job.device), state, hook, inputs)})
    job.rows.note(f"{job.part}, {batch} inputs, backend {dist.get_backend()}.")


def measure(model: nn.Module, state: Any, hook: Any, inputs: Tensor) -> Row:
    """Return a row: launches of one step, host microseconds of many."""
    device = inputs.device
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    times: dict[int, list[float]] = {}
    if hook is not None:
        wrapped.register_comm_hook(state, marked(hook, times))
    for _ in range(_WARMUP):
        _step(wrapped, inputs)
    times.clear()
    backward = median(_step(wrapped, inputs) for _ in range(_STEPS))
    microseconds = {index: median(each) for index, each in times.items()}
    launches, whole = counted(_profiled(wrapped, inputs))
    return {
        "buckets": len(times) or None,
        **_by_bucket("launches", launches),
        "launches in backward": whole,
        **_by_bucket("host us", microseconds),
        "host us of backward": backward,
    }


def _by_bucket(name: str, of_bucket: dict[int, float] | dict[int, int]) -> Row:
    """Return the columns of one quantity: the first bucket's, one's in the middle, the last one's, and all together."""
    order = [of_bucket[index] for index in sorted(of_bucket)]
    if not order:
        return {f"{name}: {place}": None for place in ("first", "middle", "last", "all buckets")}
    chosen = {"first": order[0], "middle": order[len(order) // 2], "last": order[-1], "all buckets": sum(order)}
    return {f"{name}: {place}": number for place, number in chosen.items()}


def _step(model: nn.Module, inputs: Tensor) -> float:
    """Return the host's microseconds in a backward, behind which the device is waited for."""
    model.zero_grad()
    loss = model(inputs).square().mean()
    synchronize(inputs.device)
    with torch.profiler.record_function(_BACKWARD):
        begin = time.perf_counter()
        loss.backward()
        took = (time.perf_counter() - begin) * 1e6
    synchronize(inputs.device)
    return took


def marked(hook: Callable[..., Any], times: dict[int, list[float]]) -> Callable[..., Any]:
    """Return a hook that does the same, notes the host's microseconds by bucket, and shows in a profile."""

    def call(
        state: Any,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:  # DDP looks at both
        with torch.profiler.record_function(f"{_HOOK} {bucket.index()}"):
            begin = time.perf_counter()
            future: torch.futures.Future[torch.Tensor] = hook(state, bucket)
            times.setdefault(bucket.index(), []).append((time.perf_counter() - begin) * 1e6)
        return future

    return call


def _profiled(model: nn.Module, inputs: Tensor) -> list[Event]:
    """Return what one step does on the host."""
    events: Any = None
    for _ in range(2):  # the first profile of a process may miss what happens while it starts
        with torch.profiler.profile() as profile:
            _step(model, inputs)
        events = profile.events()
    found = [Event(e.name, e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CPU"]
    if inputs.device.type == "cuda" and not any(_LAUNCH.match(event.name) for event in found):
        raise RuntimeError("the profiler sees no launches here")
    return found


def counted(events: Sequence[Event]) -> tuple[dict[int, int], int]:
    """Return how many launches each bucket's hook had, and backward in all."""
    launches = [event for event in events if _LAUNCH.match(event.name)]
    marks = [event for event in events if event.name.startswith((_HOOK, _BACKWARD))]
    within = {mark.name: sum(mark.begin <= each.begin < mark.end for each in launches) for mark in marks}
    whole = within.pop(_BACKWARD, 0)
    return {int(name.removeprefix(_HOOK)): count for name, count in within.items()}, whole
