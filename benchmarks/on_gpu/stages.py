"""The stages in their order: what each measures, its share of the time, and the processes that it is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from benchmarks.on_gpu.job import Job


@dataclass(frozen=True)
class Stage:
    """One section of the page.

    module: of this package, whose `run(job)` does it.
    share: of the time, at most: beside the shares of the stages to come, of what is left.
    parts: the jobs, one after the other, each in processes of its own, and how many ranks each has.
    rehearsed: those that a CPU can try, as well; () for a stage that needs a GPU.
    environment: variables of its processes.
    """

    name: str
    title: str
    about: str
    module: str
    share: float
    parts: dict[str, int]
    rehearsed: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Callable[[Job], None]:
        """What its processes do."""
        run: Callable[[Job], None] = import_module(f"benchmarks.on_gpu.{self.module}").run
        return run


STAGES = (
    Stage(
        "tests",
        "Tests that run on a GPU",
        "pytest's counts, and the names of what failed.",
        "suite",
        0.34,
        {"hook": 1, "kernels": 1},
        ("hook", "kernels"),
    ),
    Stage(
        "kernels",
        "Kernels against their floor",
        "Medians of 20 calls between CUDA events, in microseconds, launches enqueued ahead. The floor is the bytes "
        "that must be read and written over the bandwidth of a device-to-device copy of 1 GB in the same process. "
        "Calls rotate through buffers that exceed the caches. Rows `(W, n)` have a bucket's bytes together.",
        "kernels",
        0.1,
        {"25 MB float32": 1, "100 MB bfloat16": 1},
        ("25 MB float32",),
    ),
    Stage(
        "launches",
        "Launches and host time of `GAFState()`",
        "One rank on NCCL, which then sends nothing and launches next to nothing itself. Alone it divides by 1 in "
        "torch, and copies, where several scale in one launch: one launch a bucket more. Launches are kernels, copies "
        "and fills, as the profiler saw them started; host microseconds are medians of 20 steps without the profiler, "
        "each behind a synchronisation.",
        "launches",
        0.07,
        {"resnet50": 1},
    ),
    Stage(
        "graph",
        "A step captured in a CUDA graph",
        "The same capture with plain DDP says whether this machine can capture a step at all.",
        "graph",
        0.07,
        {"plain DDP": 1, "gaf_hook": 1},
        environment={"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"},  # as torch asks for it
    ),
    Stage(
        "steps",
        "Step times beside plain DDP",
        "Both in one process, step by step in turn; the ratio is of the medians, low and high are of pairs of steps. "
        "Ranks on gloo share the one GPU, and their gradients go through the host: a stress of the way, no speed that "
        "a user would see. Memory is the most that torch reserved for the model, its optimizer and two steps.",
        "steps",
        0.26,
        {"W = 1": 1, "W = 2": 2, "W = 4": 4},
        ("W = 1", "W = 2"),
    ),
    Stage(
        "accuracy",
        "The paper's set-up on CIFAR-100",
        "Micro-batches in one process, ResNet-18 in bf16: `MicrobatchFilter` beside plain averaging of the same "
        "draws and as many steps skipped at random, with right labels and with human ones of which 40 % are wrong. "
        "Test accuracy in % after each epoch.",
        "accuracy",
        0.16,
        {"cifar100": 1},
        ("cifar100",),
    ),
)


def stage_named(name: str) -> Stage:
    """Return the stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)
