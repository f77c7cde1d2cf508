"""What every benchmark here shares: ranks, a hardware banner, interleaved timing, tables and JSON."""

import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

Timings = dict[str, list[float]]


def start_ranks() -> torch.device:
    """Join torchrun's group, on NCCL if every local rank has a GPU of its own, and return this rank's device."""
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun, e.g. torchrun --standalone --nproc-per-node 4 -m benchmarks.…")
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
        return torch.device("cuda", local)
    dist.init_process_group("gloo")
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls_at_once(size: int, device: torch.device) -> int:
    """Return how many calls on so many bytes are one timing: a GPU's must outlast their launch."""
    if device.type == "cuda":
        return 20 if size <= 2**28 else 5
    return 10 if size < 2**20 else 1


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    calls: int = 1,
    warmup: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Timings:
    """Time the candidates in turn, A B C A B C …, so that a drift of the machine's speed hits all alike.

    Returns seconds per call: for each candidate one number per repeat, the mean over the ranks of a group.
    """
    timings: Timings = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, candidate in candidates.items():
            synchronize(device)
            if dist.is_initialized():
                dist.barrier(group=group)
            begin = time.perf_counter()
            for _ in range(calls):
                candidate()
            synchronize(device)
            if turn >= warmup:
                timings[name].append((time.perf_counter() - begin) / calls)
    return mean_over_ranks(timings, device, group)


def mean_over_ranks(timings: Timings, device: torch.device, group: dist.ProcessGroup | None = None) -> Timings:
    """Return, for each candidate and repeat, the mean of the ranks' seconds."""
    if not dist.is_initialized():
        return timings
    total = torch.tensor(list(timings.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return dict(zip(timings, (total / dist.get_world_size(group)).tolist(), strict=True))


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Return by how many bytes memory grew at most during the call: what torch reserves of a GPU, or resident.

    Memory that the caller keeps for reuse does not count on a CPU: measure its first call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)  # not allocated: one stream cannot use what another freed
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return float(torch.cuda.max_memory_reserved(device) - before)
    # Freed memory that is used again shall count: glibc gives it back to the system first.
    give_back_freed = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back_freed is not None:
        give_back_freed(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    before = _resident("VmRSS")
    run()
    return float(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def ratio(timings: Timings, name: str, baseline: str) -> dict[str, float]:
    """Return the median, lowest and highest ratio of a candidate to the baseline, repeat by repeat."""
    ratios = [a / b for a, b in zip(timings[name], timings[baseline], strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what a reader must know to compare the numbers."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": dist.get_backend() if dist.is_initialized() else "none",
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "link": os.environ.get("GAF_DDP_LINK", "one machine" if world_size > 1 else "none"),
    }


def machine(facts: Mapping[str, Any]) -> str:
    """Return in a line on what something was measured, for the foot of a picture."""
    backend = "" if facts["backend"] == "none" else f"{facts['backend']}, "
    return f"{facts['device']}, {facts['cores']} cores, {backend}torch {facts['torch']}, {facts['date']}"


def banner(facts: dict[str, Any]) -> str:
    """Return the facts as comment lines, as nccl-tests prints them."""
    return "\n".join(f"# {name}: {value}" for name, value in facts.items())


def say(text: str) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def write_json(path: Path | None, facts: dict[str, Any], rows: list[dict[str, Any]], append: bool = False) -> None:
    """Write the facts and rows on rank 0, if a path is given; or append them to the runs that it holds."""
    if path is None or (dist.is_initialized() and dist.get_rank() != 0):
        return
    result: Any = {"hardware": facts, "rows": rows}
    if append:
        result = [*(read_runs(path) if path.exists() else []), result]
    path.write_text(json.dumps(result, indent=1) + "\n")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs that a file of `write_json` holds: one, or a list of them."""
    runs = json.loads(path.read_text())
    return runs if isinstance(runs, list) else [runs]


def end_ranks() -> None:
    """Leave the group together: a rank that leaves while others still talk to it can take them along."""
    dist.barrier()
    dist.destroy_process_group()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
