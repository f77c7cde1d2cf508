"""A job's folder: one job at a time, and one line where it cannot be written. What is written stays whole."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launch.errors import SettingsError
from launch.folder import claim, write_whole
from tests.launch.jobs import RunRanks, run_job
from tests.marks import job_but

HOLD = "import os, sys; from pathlib import Path; from launch.folder import claim; held = claim(Path(sys.argv[1]))"
WAIT = "print('held', flush=True); sys.stdin.read()"
# Loader workers are such children: they live on for seconds after their rank was killed.
FORK = "os.fork() or sys.stdin.read()"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_holder(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a process which claims the folder and waits."""
    started: list[subprocess.Popen[str]] = []

    def start(*lines: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", "; ".join([HOLD, *lines, WAIT]), str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_jobs_cannot_have_one_folder(tmp_path: Path, start_holder: Start) -> None:
    start_holder()
    with pytest.raises(SettingsError, match=f"--out must be a folder no other job is writing, found {tmp_path}"):
        claim(tmp_path)


@pytest.mark.parametrize("lines", [[], [FORK]], ids=["alone", "with a child that lives on"])
def test_a_job_that_was_killed_holds_nothing(tmp_path: Path, start_holder: Start, lines: list[str]) -> None:
    holder = start_holder(*lines)
    holder.kill()
    holder.wait()
    claim(tmp_path).close()


def test_a_file_is_replaced_and_the_one_before_kept(tmp_path: Path) -> None:
    for content in (b"one", b"two", b"three"):
        write_whole(tmp_path / "file", content, previous=tmp_path / "before")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"three", "before": b"two"}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that makes a disk of its own, in memory, with these mount options; gone after the test."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options: str) -> Path:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small disk needs root and mount")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mounted
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


# The checkpoint of this job takes 160 kB.
JOB = ["--steps", 8, "--eval-every", 2, "--checkpoint-every", 4, "--method", "tau", "--seeds", 1]
CANNOT_WRITE = "launch.train: error: on rank 0: --out must be a folder this job can write, found {} ({})\n"


@pytest.mark.job
def test_a_disk_that_fills_up_ends_every_rank_with_one_line(gloo_ranks: RunRanks, mount: Callable[[str], Path]) -> None:
    """There is room for one checkpoint and for half of the next."""
    folder = mount("size=240k")
    outcomes = run_job(gloo_ranks, 2, [*JOB, "--out", folder], timeout=60)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert outcomes[0].err.endswith(CANNOT_WRITE.format(folder, "No space left on device"))
    assert "Traceback" not in outcomes[0].err + outcomes[1].err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4
    assert list(folder.glob("*.tmp")) == []


UNWRITABLE = [("size=4k", "No space left on device"), ("ro", "Read-only file system")]


@pytest.mark.parametrize(("options", "reason"), job_but(UNWRITABLE[0], of=UNWRITABLE))
def test_a_disk_that_cannot_be_written_ends_every_rank_with_one_line(
    gloo_ranks: RunRanks, mount: Callable[[str], Path], options: str, reason: str
) -> None:
    folder = mount(options)
    outcomes = run_job(gloo_ranks, 2, [*JOB, "--out", folder], timeout=60)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert outcomes[0].err.endswith(CANNOT_WRITE.format(folder, reason))
    assert "Traceback" not in outcomes[0].err
    assert outcomes[1].err == ""
    assert list(folder.glob("*.tmp")) == []
