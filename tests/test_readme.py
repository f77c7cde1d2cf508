"""README's commands are real: two in the quick start, files it links to, and code that runs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.ballots.late import LateFilter
from tests.nets import batches, mlp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_quick_start_has_exactly_two_commands() -> None:
    quick_start = README.split("## Quick start")[1].split("\n## ")[0]
    install, test = re.findall(r"```bash\n(.*?)```", quick_start, flags=re.S)
    assert "-m launch.train" in install
    assert test.endswith("-m pytest -n 2\n")
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for command in (install, test))
    assert "```bash" not in README.replace(quick_start, "")


def test_every_link_into_the_repository_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def blocks(language: str) -> list[str]:
    """Return README's blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_it_fits() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.job
def test_its_script_names_the_rank_with_wrong_labels_as_it_says(tmp_path: Path) -> None:
    script, said = tmp_path / "train.py", README.split("```\n```\n")[1].split("```")[0].splitlines()
    script.write_text(next(block for block in blocks("python") if block.startswith("# train.py")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*torchrun, script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    first, rank, advice = result.stdout.splitlines()
    assert (first, advice) == (said[0], said[2])
    assert re.match(r"  rank 1 on \S+: kept \d+ %, z \d", rank)
    assert "out since step" in rank


def read_held_out_data(device: torch.device, block: str) -> int:
    """Run README's lines between the steps of a small model; return how many readings were folded."""
    model = DistributedDataParallel(mlp())
    state, criterion, folded = GAFState(), torch.nn.functional.cross_entropy, 0
    model.register_comm_hook(state, gaf_hook)
    ((held_inputs, held_targets),) = batches(dist.get_rank(), 1)
    for step in range(41):
        exec(block, {**globals(), **locals()})
        folded += isinstance(state._way, LateFilter) and state._way.readings.waiting > 0 and step % 20 == 0
        criterion(model(held_inputs), held_targets).backward()
    return folded


def test_its_lines_on_held_out_data_run(gloo_ranks: Callable[..., list[Any]]) -> None:
    (block,) = (each for each in blocks("python") if "state.reference" in each)
    assert gloo_ranks(3, read_held_out_data, block) == [2, 2, 2]  # not before the first step
