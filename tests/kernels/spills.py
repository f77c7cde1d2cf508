"""Triton's kernels compiled for GPUs without one, by Triton's compiler and the assembler it bundles."""

import re
import subprocess
from pathlib import Path
from typing import Any


def spilled_bytes(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, capability: int,
                  folder: Path) -> int:  # fmt: skip
    """Return the bytes of registers that a kernel stores in memory; PTX never shows them, ptxas does."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource, compile

    from gaf_ddp.kernels.gram_triton import OPTIONS

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    target = GPUTarget("cuda", capability, 32)
    ptx = compile(source, target=target, options={"num_warps": warps, **OPTIONS}).asm["ptx"]
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    assembler = get_ptxas(capability).path  # by architecture another one
    command: list[str | Path] = [assembler, "-v", f"-arch={architecture[1]}", file, "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores", report)
    assert spills, report
    return max(map(int, spills))
