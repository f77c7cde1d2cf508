"""Stage 5: a training step with the hook beside one of plain DDP, in turn, and the memory of each."""

import gc
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.hooks import hooks, wrap
from benchmarks.measure import interleaved, ratio, synchronize
from benchmarks.on_gpu.job import Job, join_group
from benchmarks.on_gpu.rows import Row
from benchmarks.step_time import build
from gaf_ddp import check_replicas

_LEAST, _MOST = 3, 30  # repeats
_TO_START = 8.0  # seconds that a case needs before it is worth to begin


@dataclass(frozen=True)
class Case:
    """A model, its batch, and whether it runs in bf16 autocast."""

    name: str
    model: str
    batch: int
    size: int
    autocast: bool = False


CASES = (
    Case("resnet50, 64 images", "resnet50", 64, 224),
    Case("resnet50, 64 images, bf16 autocast", "resnet50", 64, 224, autocast=True),
    Case("transformer of 50 M, 16 x 512, bf16 autocast", "large transformer", 16, 512, autocast=True),
)
REHEARSED = (Case("transformer, bf16 autocast", "transformer", 2, 8, autocast=True),)


class Training:
    """One way's own model and optimizer."""

    def __init__(self, hook: str, case: Case, device: torch.device) -> None:
        self.model = wrap(hooks()[hook], network(case).to(device), device)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self._device, self._autocast = device, case.autocast

    def step(self, inputs: Tensor) -> None:
        """Train one step."""
        self._optimizer.zero_grad()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss = self.model(inputs).float().square().mean()
        loss.backward()
        self._optimizer.step()


def network(case: Case) -> nn.Module:
    """Return a case's model, the same on every rank."""
    if case.model != "large transformer":
        return build(case.model, case.size)[0]
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 16, enable_nested_tensor=False)


def inputs_of(case: Case, device: torch.device) -> Tensor:
    """Return a batch."""
    shape = (case.size, 512) if case.model == "large transformer" else build(case.model, case.size)[1]
    torch.manual_seed(1 + dist.get_rank())  # each rank its own
    return torch.randn(case.batch, *shape, device=device)


def run(job: Job) -> None:
    """Measure all cases with a part's ranks."""
    join_group(job.device)
    cases = REHEARSED if job.rehearse else CASES
    for place, case in enumerate(cases):
        left = job.agreed_left()
        if left / (len(cases) - place) < _TO_START:
            job.rows.fail(f"{job.part}, {case.name}: no time was left for it")
            continue
        with job.rows.attempt(f"{job.part}, {case.name}"):
            row = measure(case, job, end=left * (1 - 1 / (len(cases) - place)))
            job.rows.add({"case": case.name, "ranks": dist.get_world_size(), "group": dist.get_backend(), **row})
        gc.collect()


def measure(case: Case, job: Job, end: float) -> Row:
    """Return a row's numbers, of as many repeats as fit in until only `end` seconds are left for the other cases.

    Raises:
        RuntimeError: the ranks' parameters differ after all steps.
    """
    device = job.device
    inputs = inputs_of(case, device)
    Training("ddp", case, device).step(inputs)  # libraries take their own memory once
    memory = {hook: held(hook, case, inputs) for hook in ("ddp", "gaf")}
    trainings = {hook: Training(hook, case, device) for hook in ("ddp", "gaf")}
    run = {name: lambda training=training: training.step(inputs) for name, training in trainings.items()}
    first = interleaved(run, 1, device, warmup=1)
    seconds = 0.8 * (job.agreed_left() - end)  # the same on every rank, as the timings are
    repeats = int(seconds / sum(median(each) for each in first.values()))
    timings = interleaved(run, min(max(repeats, _LEAST), _MOST), device, warmup=0)
    check_replicas(trainings["gaf"].model)
    pairs, of_medians = ratio(timings, "gaf", "ddp"), median(timings["gaf"]) / median(timings["ddp"])
    return {
        "DDP ms": median(timings["ddp"]) * 1e3,
        "gaf_hook ms": median(timings["gaf"]) * 1e3,
        "ratio": f"{of_medians:.3f}",
        "low": f"{pairs['low']:.3f}",
        "high": f"{pairs['high']:.3f}",
        "repeats": len(timings["gaf"]),
        "DDP MB": memory["ddp"],
        "gaf_hook MB": memory["gaf"],
    }


def held(hook: str, case: Case, inputs: Tensor) -> float | None:
    """Return the most megabytes that torch reserves for a way alone, up to and with two steps; None on a CPU."""
    before = _reserved(inputs.device)
    training = Training(hook, case, inputs.device)
    for _ in range(2):
        training.step(inputs)
    synchronize(inputs.device)
    return (torch.cuda.max_memory_reserved() - before) / 1e6 if inputs.device.type == "cuda" else None


def _reserved(device: torch.device) -> float:
    """Return the bytes that torch has of the GPU once it gave back what it can, and count the most from here."""
    if device.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return float(torch.cuda.memory_reserved(device))
