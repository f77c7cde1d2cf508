"""Runs launch.train on several ranks inside a test, and makes plans without a command line."""

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch import checkpoint
from launch.cli import parse
from launch.records import Record, Result, results
from launch.settings import Plan, plan
from launch.train import main

REPOSITORY = Path(__file__).parents[2]
# Its gradient fills several buckets, so that DDP's rebuilding of them after the first step matters.
SEVERAL_BUCKETS = ["--data", "fake", "--image-size", 32, "--model", "mlp", "--corrupt-ranks", 1, "--seeds", 1]
SEVERAL_BUCKETS += ["--steps", 12, "--eval-every", 2, "--checkpoint-every", 4, "--batch-size", 4, "--augment"]
SEVERAL_BUCKETS += ["--tau", 1]  # keeps some, and not all
# What a test under torchrun or Slurm would hand on by mistake.
NOT_INHERITED: tuple[str, ...] = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCH",
    "SLURM_",
    "SKYPILOT_",
    "PET_",
    "GLOO_",
)
NOT_INHERITED += ("GPUS", "NODES", "RDZV_", "RESTARTS")

RunRanks = Callable[..., list[Any]]


@dataclass(frozen=True)
class Outcome:
    """How one rank's program ended and what it showed."""

    code: int
    out: str
    err: str


def rank_of_job(device: torch.device, port: int, arguments: list[str]) -> Outcome:
    """Run the program on one rank: it makes its own group, so the test's group ends first."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same job wherever the tests run
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    warnings.resetwarnings()  # plotting and TensorBoard are not ours to keep free of them
    out, err = io.StringIO(), _Shown()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue())


class _Shown(io.StringIO):
    """Keeps what is written, and passes it on for the case that the process dies."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def run_job(
    ranks: RunRanks,
    world: int,
    arguments: Sequence[object],
    body: Callable[..., Outcome] = rank_of_job,
    **options: Any,
) -> list[Outcome]:
    """Call launch.train's main on `world` ranks, as torchrun would: with a store that outlives the ranks.

    A free port for rank 0 to listen on might be another connection's by the time it does.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return ranks(world, body, store.port, [str(a) for a in arguments], **options)


def run_job_until_power_cut(ranks: RunRanks, world: int, arguments: Sequence[object], saves: int) -> None:
    """Do the same, but rank 0 dies without a word right after it has written its checkpoint `saves` times."""
    run_job(ranks, world, [saves, *arguments], body=_rank_until_power_cut)


def _rank_until_power_cut(device: torch.device, port: int, arguments: list[str]) -> Outcome:
    real_save, left = checkpoint.save, int(arguments.pop(0))

    def save(plan: Plan, progress: checkpoint.Progress) -> None:
        nonlocal left
        real_save(plan, progress)
        left -= 1
        if left == 0:
            os._exit(9)

    checkpoint.save = save
    return rank_of_job(device, port, arguments)


def environment(**values: str) -> dict[str, str]:
    """Return the test's own environment with the repository, without GPUs, and with the values given."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return {**own, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **values}


def job_results(folder: Path) -> dict[str, list[Result]]:
    """Return what the metrics in a job's folder sum up to."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return results(Record(**json.loads(line)) for line in lines)


def assert_same_job(folder: Path, other: Path) -> None:
    """Hold two jobs to the same metrics, and to last checkpoints of the same bits."""
    for name in ("metrics.jsonl", "table.txt"):
        assert (folder / name).read_text() == (other / name).read_text()
    one, another = (torch.load(f / "checkpoint.pt", weights_only=True)["trainer"] for f in (folder, other))
    assert_same(one, another)


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Hold both to the same structure, and to tensors of the same bits."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}/{number}")
    else:
        assert one == other, path


def make_plan(*arguments: object, world: int = 4, train_size: int = 1297, out: Path = Path("unused")) -> Plan:
    """Return a plan from command line arguments, as a job on `world` ranks makes it."""
    return plan(parse([str(a) for a in arguments]), world, train_size, out)
