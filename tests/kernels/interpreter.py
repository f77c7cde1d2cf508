"""Where Triton's kernels can run: on a GPU, or in Triton's interpreter, in a process of its own.

triton.language decides at import whether its functions are interpreted.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from packaging.version import Version

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HAS_TRITON = find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_kernels = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or ON_GPU), reason="runs in the interpreter or on a GPU"
)
outside_the_interpreter = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")


def run_interpreted(file: str, *arguments: str) -> str:
    """Run a file's tests with TRITON_INTERPRET=1 and return what pytest says; skip where they cannot run."""
    triton = pytest.importorskip("triton")
    # Triton 3.6's interpreter converts arrays of one element to scalars, which NumPy 2.4 refuses; 3.9's does not.
    if Version(triton.__version__) < Version("3.9") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("this Triton's interpreter needs an older NumPy")
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-rs", "-m", "", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
    return done.stdout
