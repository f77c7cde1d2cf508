"""Kernels compile for GPUs, without a GPU, get as far as their launch, and keep all they need in registers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.interpreter import outside_the_interpreter
from tests.kernels.spills import spilled_bytes

pytest.importorskip("triton")

pytestmark = [
    outside_the_interpreter,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("capability", [80, 90]),
]
every_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])


@every_dtype
def test_fold_does_not_spill(capability: int, dtype: str, tmp_path: Path) -> None:
    from gaf_ddp.kernels import fold_triton

    own = {
        "x": f"*{dtype}",
        "table": "*i64",
        "signs": "*i8",
        "partial": "*fp32",
        "squares": "*fp64",
        "rows": "i32",
    }
    for size in (64, 100, 1000, 4096):
        fixed, kernel = fold_triton.constants(size), fold_triton._fold_kernel
        assert spilled_bytes(kernel, own, fixed, fold_triton.WARPS, capability, tmp_path) == 0


@pytest.mark.parametrize("add", [False, True])
def test_adding_up_does_not_spill(capability: int, add: bool, tmp_path: Path) -> None:
    from gaf_ddp.kernels import fold_triton

    own = {"partial": "*fp32", "squares": "*fp64", "sketch": "*fp32", "square": "*fp64"}
    types = {**own, "programs": "i32", "pieces": "i32"}
    fixed, kernel = {"SIZE": 4096, "ADD": add, **fold_triton.ADD_TILE}, fold_triton._add_kernel
    assert spilled_bytes(kernel, types, fixed, fold_triton.ADD_WARPS, capability, tmp_path) == 0


@every_dtype
def test_scale_and_correct_do_not_spill(capability: int, dtype: str, tmp_path: Path) -> None:
    from gaf_ddp.kernels import scale_triton

    scalars = {name: "*fp64" for name in ("square", "count", "limit", "share", "shares")}
    types = {"gradient": f"*{dtype}", "total": f"*{dtype}", "out": f"*{dtype}", "numbers": "i32", **scalars}
    scaling, correcting = scale_triton._scale_kernel, scale_triton._correct_kernel
    kernels: list[tuple[Any, dict[str, Any]]] = [
        (scaling, {"IN_PLACE": True, "BLOCK": scale_triton.BLOCK}),
        (scaling, {"IN_PLACE": False, "BLOCK": scale_triton.APART_BLOCK}),
        (correcting, {"EXACT": 1e-6, "BLOCK": scale_triton.BLOCK}),
    ]
    for kernel, fixed in kernels:
        assert spilled_bytes(kernel, types, fixed, scale_triton.WARPS, capability, tmp_path) == 0


@pytest.mark.timeout(400)
def test_every_kernel_gets_as_far_as_its_launch(capability: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.launched", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 3 * 2 * 8 + 3  # dtypes, sizes, functions; and decisions by three rules
