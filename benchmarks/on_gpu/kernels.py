"""Stage 2: each kernel on one bucket, against the floor of its bytes, and what plain torch takes."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.cost import SKETCH_SIZE
from benchmarks.filtering import rotating
from benchmarks.on_gpu.job import Job
from benchmarks.on_gpu.rows import Row
from gaf_ddp import NeighborhoodAgreement, combine, gram
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.kernels.scale import correct, scale
from gaf_ddp.rules.agreement import decide
from gaf_ddp.runtime import device as devices

BUCKETS = {"25 MB float32": (25 * 2**20, torch.float32), "100 MB bfloat16": (100 * 2**20, torch.bfloat16)}
REHEARSED = {"25 MB float32": (2**18, torch.float32)}
WORLDS = (4, 8)
_CACHES = 2**28  # bytes; more than any cache
_REPEATS, _WARMUP = 20, 3
_AHEAD = 2_000_000  # cycles that the device idles, about a millisecond, while the host enqueues a call


@dataclass(frozen=True)
class Call:
    """One kernel on one bucket; size: bytes that it must read and write, None where there are next to none."""

    kernel: str
    function: Callable[[], object]
    size: float | None = None
    world: int | None = None


def run(job: Job) -> None:
    """Measure all kernels on a part's bucket."""
    size, dtype = (REHEARSED if job.rehearse else BUCKETS)[job.part]
    bytes_per_us = copy_bandwidth(2**22 if job.rehearse else 2**30, job.device)
    with_triton = devices.kernels(job.device.type) is not None
    if not with_triton and not job.rehearse:
        job.rows.fail("Triton's kernels do not run here: all rows are plain torch's")
    empty = microseconds(lambda: None, job.device)
    job.rows.note(f"{job.part}: a copy moves {bytes_per_us / 1e3:.0f} GB/s, read and written; no call: {empty:.1f} us.")
    for call in calls_on(size, dtype, job.device):
        name = f"{call.kernel}, W = {call.world}" if call.world else call.kernel
        with job.rows.attempt(name):
            job.rows.add({"bucket": job.part, "kernel": name, **measure(call, job.device, bytes_per_us)})


def measure(call: Call, device: torch.device, bytes_per_us: float) -> Row:
    """Return a row's numbers: of the kernel, of its floor, and of plain torch."""
    own = microseconds(call.function, device)
    with without_triton():
        plain = microseconds(call.function, device)
    floor = None if call.size is None else call.size / bytes_per_us
    return {
        "us": own,
        "GB/s": None if call.size is None else call.size / own / 1e3,
        "floor us": floor,
        "times the floor": None if floor is None else own / floor,
        "plain torch us": plain,
        "plain torch / this": plain / own,
    }


def calls_on(size: int, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Yield every kernel on a bucket of so many bytes."""
    numbers = size // dtype.itemsize
    buffers = [torch.randn(numbers, device=device).to(dtype) for _ in range(max(_CACHES // size, 2))]
    if device.type == "cpu":
        del buffers[2:]
    square, two, limit = (torch.tensor(v, dtype=torch.float64, device=device) for v in (1.0, 2.0, torch.inf))
    half = torch.tensor([0.5, 0.0], dtype=torch.float64, device=device)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    spans = whole(numbers)
    yield Call("fold", rotating(lambda x: fold(x, spans, SKETCH_SIZE), buffers), size + 4 * SKETCH_SIZE)
    yield Call("scale, halves", rotating(lambda x: scale(x, square, two, limit), buffers), 2 * size)
    yield Call("correct, doubles", rotating(lambda x: correct(x, half), buffers), 2 * size)
    yield Call("correct, nothing to do", rotating(lambda x: correct(x, one), buffers))
    for world in WORLDS:
        yield from _calls_on_rows([x.view(world, -1) for x in buffers], size)


def _calls_on_rows(buffers: list[Tensor], size: int) -> Iterator[Call]:
    """Yield the kernels on rows `(W, n)`."""
    count, device = len(buffers[0]), buffers[0].device
    weights, out = torch.full((count,), 1 / count, device=device), torch.empty_like(buffers[0][0])
    gramian, rule = torch.eye(count, dtype=torch.float64, device=device), NeighborhoodAgreement(1.0)
    yield Call("gram", rotating(gram, buffers), size + 8 * count**2, count)
    yield Call("combine", rotating(lambda rows: combine(rows, weights, out), buffers), size * (1 + 1 / count), count)
    yield Call("decide", lambda: decide(gramian, rule, 10.0), None, count)


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Return the bytes that a copy on the device reads and writes in a microsecond."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / microseconds(lambda: target.copy_(source), device)


def microseconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the median microseconds that the device takes for a call, launches enqueued ahead."""
    for _ in range(_WARMUP):
        function()
    if device.type == "cpu":
        return median(_on_host(function) for _ in range(_REPEATS))
    pairs = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_AHEAD)
        begin.record()
        function()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return median([float(begin.elapsed_time(end)) * 1e3 for begin, end in pairs])


def _on_host(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e6


@contextmanager
def without_triton() -> Iterator[None]:
    """Let plain torch do the kernels' work inside."""
    before = os.environ.get("GAF_DDP_TRITON")
    os.environ["GAF_DDP_TRITON"] = "0"
    _choose_anew()
    try:
        yield
    finally:
        if before is None:
            del os.environ["GAF_DDP_TRITON"]
        else:
            os.environ["GAF_DDP_TRITON"] = before
        _choose_anew()


def _choose_anew() -> None:
    devices.kernels.cache_clear()
    devices._has_kernels.cache_clear()
