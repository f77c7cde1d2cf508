"""The checkpoint file: whole or not there, and refused where it does not fit. Whole jobs are in test_jobs.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import checkpoint
from launch.checkpoint import START, Progress
from launch.ranks import Here, LaunchError
from launch.records import Record
from launch.settings import Plan
from tests.launch.jobs import make_plan

HERE = Here(rank=0, world=1, local_rank=0, device=torch.device("cpu"), group=None)
RECORD = Record("gaf", 0, 20, 50.0, 1.0, 0.1, 0.1, [0.9, 0.2], None)
PROGRESS = Progress(run=1, step=20, trainer={"model": {"weight": torch.ones(3)}}, records=[RECORD])


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _plan(folder: Path, *arguments: object) -> Plan:
    return make_plan("--out", folder, "--resume", *arguments, out=folder)


def test_what_is_saved_is_restored(tmp_path: Path) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    found = checkpoint.restore(_plan(tmp_path), HERE)
    assert (found.run, found.step, found.records) == (1, 20, [RECORD])
    assert found.trainer is not None
    assert torch.equal(found.trainer["model"]["weight"], torch.ones(3))


def test_nothing_saved_is_a_new_start(tmp_path: Path) -> None:
    assert checkpoint.restore(_plan(tmp_path), HERE) is START


def test_a_job_that_does_not_resume_does_not_look(tmp_path: Path) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    assert checkpoint.restore(make_plan(out=tmp_path), HERE) is START


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    before = checkpoint.checkpoint_path(tmp_path).read_bytes()

    def full(content: object, file: object) -> None:
        file.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(_plan(tmp_path), Progress(1, 40, None, []))
    assert checkpoint.checkpoint_path(tmp_path).read_bytes() == before


def test_other_settings_are_named(tmp_path: Path) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    with pytest.raises(LaunchError, match=r"--resume must keep the settings .*--lr \(was 0.05, now 0.1\)"):
        checkpoint.restore(_plan(tmp_path, "--lr", 0.1), HERE)


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    checkpoint.checkpoint_path(tmp_path).write_bytes(content)
    with pytest.raises(LaunchError, match=r"--out must hold a checkpoint of launch.train, found .*checkpoint.pt"):
        checkpoint.restore(_plan(tmp_path), HERE)
