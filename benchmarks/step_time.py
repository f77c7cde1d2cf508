"""A DDP training step with each hook, as a ratio to plain DDP in the same run.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.step_time --model resnet18 --json out.json

Every hook trains its own copy of the model; the copies take turns, step by step. Times are medians of the repeats,
ratios are medians over repeats of the hook to plain DDP, with the lowest and highest. `backward` holds the
communication; `step` is forward, backward and optimizer, and where held-out data are read a part of that. `memory` is
the peak of one step beyond plain DDP's, in gradients, on GPUs (`collectives.py` measures it on CPUs). `bytes` counts
what the hosts sent in one step, relative to plain DDP, through the interface that --interface names: what left them, or
with lo all that ranks on one host sent.
"""

import argparse
import os
import time
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.command_line import described, new_file, positive
from benchmarks.hooks import READS_EVERY, Hook, hooks, wrap
from benchmarks.measure import (
    Timings,
    banner,
    end_ranks,
    hardware,
    mean_over_ranks,
    peak_memory,
    ratio,
    say,
    start_ranks,
    synchronize,
    write_json,
)
from tools.hosts import bytes_sent


def build(name: str, size: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a model and the shape of one input; size is the image's edge or the sequence's length."""
    import torchvision

    torch.manual_seed(0)
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Linear(256, 10)), (size, 256)
    return getattr(torchvision.models, name)(num_classes=10), (3, size, size)


def interface(text: str) -> str:
    """Return the name of a network interface of this host, as a type of arguments."""
    try:
        bytes_sent(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a network interface of this host, found {text!r}") from None
    return text


class Training:
    """One hook's: a model of its own, its optimizer, and one step to be timed."""

    def __init__(self, hook: Hook, model: nn.Module, device: torch.device) -> None:
        self.note = hook.note
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._model, self._state = wrap(hook, model.to(device), device), hook.state
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)
        self._device = device

    def step(self, inputs: Tensor) -> tuple[float, float]:
        """Return the seconds of one backward and of the whole step, all ranks starting each together."""
        self._optimizer.zero_grad()
        forward, loss = self._timed(lambda: self._model(inputs).square().mean())
        backward, _ = self._timed(loss.backward)
        update, _ = self._timed(self._optimizer.step)
        return backward, forward + backward + update + self._read(inputs) / READS_EVERY

    def _read(self, inputs: Tensor) -> float:
        """Return the seconds of reading a batch of held-out data, if this hook does."""
        state = self._state
        if state is None:
            return 0.0
        seconds, _ = self._timed(lambda: state.reference(lambda t: self._model(inputs / t).square().mean()))
        return seconds

    def _timed(self, run: Any) -> tuple[float, Any]:
        synchronize(self._device)
        dist.barrier()
        begin = time.perf_counter()
        result = run()
        synchronize(self._device)
        return time.perf_counter() - begin, result


def measure(trainings: dict[str, Training], inputs: Tensor, repeats: int) -> tuple[Timings, Timings]:
    """Return the seconds of backward and of the step, by hook; three rounds of warm-up first."""
    backward: Timings = {name: [] for name in trainings}
    step: Timings = {name: [] for name in trainings}
    for turn in range(3 + repeats):
        for name, training in trainings.items():
            times = training.step(inputs)
            if turn >= 3:
                backward[name].append(times[0])
                step[name].append(times[1])
    return mean_over_ranks(backward, inputs.device), mean_over_ranks(step, inputs.device)


def wire_bytes(trainings: dict[str, Training], inputs: Tensor, interface: str) -> dict[str, int]:
    """Return the bytes that the hosts together send in one step with each hook."""
    counts = os.environ["LOCAL_RANK"] == "0"  # one rank for its host
    found = {}
    for name, training in trainings.items():
        dist.barrier()
        before = bytes_sent(interface)
        dist.barrier()  # another rank of this host must not send before
        training.step(inputs)
        dist.barrier()
        sent = torch.tensor(bytes_sent(interface) - before if counts else 0, device=inputs.device)
        dist.all_reduce(sent)
        found[name] = int(sent)
    return found


def measure_all(
    trainings: dict[str, Training], inputs: Tensor, repeats: int, interface: str | None
) -> list[dict[str, Any]]:
    """Return one row per hook."""
    backward, step = measure(trainings, inputs, repeats)
    sent = wire_bytes(trainings, inputs, interface) if interface else {}
    on_gpu = {name: each for name, each in trainings.items() if inputs.device.type == "cuda"}
    memory = {name: peak_memory(partial(each.step, inputs), inputs.device) for name, each in on_gpu.items()}
    return [
        {
            "hook": name,
            "backward_ms": median(backward[name]) * 1e3,
            "step_ms": median(step[name]) * 1e3,
            "backward": ratio(backward, name, "ddp"),
            "step": ratio(step, name, "ddp"),
            "memory_gradients": (memory[name] - memory["ddp"]) / training.gradient_bytes if memory else None,
            "bytes_ratio": sent[name] / sent["ddp"] if sent.get("ddp") else None,
            "note": training.note,
        }
        for name, training in trainings.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return one aligned line per hook."""
    lines = [f"{'hook':<20} {'backward':>9} {'ratio':>6} {'low':>6} {'high':>6} {'step':>9} {'ratio':>6} "
             f"{'memory':>7} {'bytes':>6}"]  # fmt: skip
    for row in rows:
        back, whole = row["backward"], row["step"]
        sent = "" if row["bytes_ratio"] is None else f"{row['bytes_ratio']:.3f}"
        memory = "" if row["memory_gradients"] is None else f"{row['memory_gradients']:.2f}"
        lines.append(
            f"{row['hook']:<20} {row['backward_ms']:>7.1f}ms {back['median']:>6.2f} {back['low']:>6.2f} "
            f"{back['high']:>6.2f} {row['step_ms']:>7.1f}ms {whole['median']:>6.2f} "
            f"{memory:>7} {sent:>6} {row['note']}"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = described(__doc__)
    parser.add_argument("--model", choices=["resnet18", "resnet50", "transformer"], default="resnet18")
    parser.add_argument("--batch-size", type=positive, default=4, help="per rank")
    parser.add_argument("--size", type=positive, default=64, help="the image's edge, or the sequence's length")
    parser.add_argument("--hooks", nargs="+", help="a selection; default all")
    parser.add_argument("-n", "--repeats", type=positive, default=15)
    parser.add_argument("--interface", type=interface, help="of every host, whose counters to read, e.g. eth0")
    parser.add_argument("--json", type=new_file, help="write the rows here")
    parser.add_argument("--append", action="store_true", help="add the run to the list in that file")
    parser.add_argument("--quick", action="store_true", help="a small transformer, five hooks, 3 repeats, instead")
    given = parser.parse_args()
    if given.quick:
        given.model, given.size, given.batch_size, given.repeats = "transformer", 8, 1, 3
        given.hooks = ["allreduce", "gaf", "gaf-bucket-sharded", "gaf-model-sharded", "gaf-bucket-bf16"]
    return given


def main() -> None:
    """Measure the chosen hooks and print a table."""
    given, device = arguments(), start_ranks()
    known = hooks()
    chosen = ["ddp", *(name for name in given.hooks or known if name != "ddp")]
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"--hooks must be among {', '.join(known)}, found {', '.join(sorted(unknown))}")
    trainings = {name: Training(known[name], build(given.model, given.size)[0], device) for name in chosen}
    inputs = torch.randn(given.batch_size, *build(given.model, given.size)[1], device=device)
    size = trainings["ddp"].gradient_bytes
    facts = {**hardware(device), "model": given.model, "gradient_bytes": size, "input": list(inputs.shape)}
    say(banner(facts))
    rows = measure_all(trainings, inputs, given.repeats, given.interface)
    say(table(rows))
    write_json(given.json, facts, rows, given.append)
    end_ranks()


if __name__ == "__main__":
    main()
