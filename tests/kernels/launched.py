"""Every kernel on its way to a launch on a GPU, without one: Triton binds, specialises and compiles, and stops there.

    python -m tests.kernels.launched 90          # the GPU's compute capability

What neither the interpreter nor Triton's compiler alone does. It needs a process of its own, in which Triton knows no
other driver, nor the kernels another.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gaf_ddp import Mean, NeighborhoodAgreement, SequentialAgreement
from gaf_ddp.kernels import decide_triton, fold_triton, gram_triton, scale_triton
from gaf_ddp.kernels.spans import Span

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1000, 4096 + 16)  # elements: some that 16 does not divide, and some that it does


class NoDriver:
    """What Triton asks a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def calls() -> list[tuple[str, Callable[[], Any]]]:
    """Return all functions that launch, with what they are given in training, and a name for each."""
    one, two = torch.ones((), dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    found: list[tuple[str, Callable[[], Any]]] = []
    for dtype in DTYPES:
        for count in COUNTS:
            x, rows = torch.ones(count, dtype=dtype), torch.ones(4, count, dtype=dtype)
            spans, sketch = (Span(3, 0, count),), torch.zeros(64)
            told = f"{dtype}, {count}"
            found += [
                (f"fold {told}", partial(fold_triton.fold, x, spans, 64)),
                (f"fold_into {told}", partial(fold_triton.fold_into, x, spans, sketch, one)),
                (f"scale {told}", partial(scale_triton.scale, x, one, one, one)),
                (f"scale, apart {told}", partial(scale_triton.scale, x, one, one, one, torch.empty_like(x))),
                (f"correct {told}", partial(scale_triton.correct, x, two)),
                (f"gram {told}", partial(gram_triton.gram, rows)),
                (f"gram, 16 ranks {told}", partial(gram_triton.gram, rows.repeat(4, 1))),
                (f"combine {told}", partial(gram_triton.combine, rows, torch.ones(4), x)),
            ]
    rules = (Mean(), NeighborhoodAgreement(0.9), SequentialAgreement(0.9))
    inner = torch.eye(4, dtype=torch.float64)
    return found + [(f"decide {rule}", partial(decide_triton.decide, inner, rule, 10.0)) for rule in rules]


def main(capability: int) -> None:
    """Call them all, twice: a second launch looks at what the first one remembered."""
    driver.set_active(NoDriver(capability))
    run = JITFunction.run
    JITFunction.run = lambda self, *given, **named: run(self, *given, **{**named, "warmup": True})
    for name, call in calls():
        for _ in range(2):
            call()
        print(name)


if __name__ == "__main__":
    main(int(sys.argv[1]))
