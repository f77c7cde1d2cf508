"""The recipes, each run by its command line: a turned rank, or replica, is left out."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launch" / "recipes"
RECIPES = {  # with what they need beside torch, and how many ranks
    "plain_ddp.py": ("torch", 4),
    "fsdp_tensor_parallel.py": ("torch", 8),
    "diloco.py": ("torch", 4),
    "diloco_torchft.py": ("torchft", 4),
    "zero.py": ("deepspeed", 4),
    "with_lightning.py": ("lightning", 4),
    "with_transformers.py": ("accelerate", 4),
    "with_torchft.py": ("torchft", 4),
}


def test_all_recipes_are_here_and_short() -> None:
    found = {path.name: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    assert found.keys() == RECIPES.keys()
    assert all(lines <= 60 for lines in found.values()), found


def assert_left_out(printed: str) -> None:
    """Assert that of four ranks rank 1 was left out, by what a recipe prints."""
    kept = {int(rank): float(share) for rank, share in re.findall(r"'(\d\d)': '([\d.]+)'", printed)}
    assert len(kept) == 4, printed
    assert kept.pop(1) < 0.5, printed
    assert min(kept.values()) > 0.9, printed


@pytest.mark.parametrize("name", [*RECIPES])
@pytest.mark.job
def test_leaves_out_who_is_turned(name: str) -> None:
    needed, ranks = RECIPES[name]
    if find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.update(PYTHONPATH=os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(FOLDER / name), "--turned", "1"]
    command += ["--steps", "50"] if ranks == 8 else []  # so many ranks share few cores here
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    if "'01': '" in finished.stdout:
        assert_left_out(finished.stdout)
    else:  # a report
        assert re.search(r"rank 1 .*kept \d\d? %.*out since step", finished.stdout), finished.stdout
