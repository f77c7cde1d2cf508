"""Stage 4: whether a step can be captured in a CUDA graph, and what the hook says to it."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hooks import hooks, wrap
from benchmarks.on_gpu.job import Job, join_group
from benchmarks.on_gpu.rows import said_by

_REFUSAL = "must not be captured in a CUDA graph"
_WARMUP = 12  # torch asks for 11 steps before a capture under DDP


def run(job: Job) -> None:
    """Capture a step of plain DDP, or with the hook."""
    join_group(job.device)
    outcome, fine = capture(job.device, with_hook=job.part == "gaf_hook")
    job.rows.add({"step of": job.part, "captured": outcome})
    if not fine and job.part == "gaf_hook":
        job.rows.fail("the hook neither works in a graph nor refuses it by name")


def capture(device: torch.device, with_hook: bool) -> tuple[str, bool]:
    """Return what became of a capture, and whether that is as it should be: captured, or refused by name."""
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    inputs = torch.randn(32, 64, device=device)
    with torch.cuda.stream(side):
        network = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 10)).to(device)
        model = wrap(hooks()["gaf" if with_hook else "ddp"], network, device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(_WARMUP):
            step(model, optimizer, inputs)
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.graph(graph):
            loss = step(model, optimizer, inputs)
        before = _replayed(graph, loss)
        after = _replayed(graph, loss)
    except Exception as error:
        refusal = next((each for each in chain(error) if _REFUSAL in str(each)), None)
        text = said_by(refusal or error)
        return (f"refused by name: {text}", True) if refusal else (f"failed: {text}", False)
    return f"works: the loss is {before:.6f}, then {after:.6f}", True


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> Tensor:
    """Train one step."""
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = model(inputs).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an exception and those that it came on top of: ending a capture raises on top of what broke it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _replayed(graph: Any, loss: Tensor) -> float:
    graph.replay()
    torch.cuda.synchronize()
    return float(loss.detach())
