"""The checkpoint file: whole or not there, and refused where it does not fit. Whole jobs are in test_jobs.py."""

import contextlib
import hashlib
import io
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import checkpoint
from launch.checkpoint import START, Progress
from launch.errors import LaunchError
from launch.ranks import Here
from launch.records import Record
from launch.settings import Plan
from tests.launch.jobs import make_plan

HERE = Here(rank=0, world=1, local_rank=0, device=torch.device("cpu"), group=None)
RECORD = Record("tau", 0, 20, 50.0, 1.0, 0.1, 0.1, [0.9, 0.2], None)
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


def test_a_job_that_does_not_resume_refuses_a_folder_with_a_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    with pytest.raises(LaunchError, match="--out must be a new folder, or be given with --resume; found a job in"):
        checkpoint.restore(make_plan(out=tmp_path), HERE)


def test_anyone_can_read_a_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 20


def _save_two(folder: Path) -> None:
    for step in (20, 40):
        checkpoint.save(_plan(folder), Progress(1, step, PROGRESS.trainer, [RECORD]))


def _restored_step(folder: Path) -> int:
    return checkpoint.restore(_plan(folder), HERE).step


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    _save_two(tmp_path)
    steps = [torch.load(path, weights_only=True)["step"] for path in checkpoint.checkpoint_paths(tmp_path)]
    assert steps == [40, 20]
    assert _restored_step(tmp_path) == 40


@contextlib.contextmanager
def _no_file_longer_than(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process sees."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    _save_two(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with _no_file_longer_than(1000), pytest.raises(OSError, match="File too large"):
        checkpoint.save(_plan(tmp_path), PROGRESS)
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # The store of this test's group lies there too.
    assert {path: after[path] for path in before} == before
    assert before.keys() == after.keys()


def test_a_job_killed_between_the_two_moves_goes_on_from_the_one_before(tmp_path: Path) -> None:
    _save_two(tmp_path)
    checkpoint.checkpoint_paths(tmp_path)[0].unlink()
    assert _restored_step(tmp_path) == 20


def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save_two(tmp_path)
    newest, previous = checkpoint.checkpoint_paths(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert _restored_step(tmp_path) == 20
    assert capsys.readouterr().err == f"launch.train: {newest} is damaged; using {previous}\n"
    checkpoint.save(_plan(tmp_path), Progress(1, 60, PROGRESS.trainer, []))
    assert torch.load(previous, weights_only=True)["step"] == 20
    assert (tmp_path / "checkpoint.damaged").exists()


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    newest, _ = checkpoint.checkpoint_paths(tmp_path)
    content = newest.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 200):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        newest.write_bytes(flipped)
        with pytest.raises(LaunchError, match=r"found .*checkpoint.pt damaged or of another kind"):
            checkpoint.restore(_plan(tmp_path), HERE)


def test_other_settings_are_named(tmp_path: Path) -> None:
    checkpoint.save(_plan(tmp_path), PROGRESS)
    with pytest.raises(LaunchError, match=r"--resume must keep the settings .*--lr \(was 0.05, now 0.1\)"):
        checkpoint.restore(_plan(tmp_path, "--lr", 0.1), HERE)


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this must not run",)


def _saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _with_digest(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "damaged or of another kind"),
        (b"no checkpoint at all", "damaged or of another kind"),
        (_saved({"model": torch.ones(3)}), "damaged or of another kind"),
        (_saved(_Code()), "damaged or of another kind"),
        (_with_digest(b"no checkpoint at all"), r"\(UnpicklingError\)"),
        (_with_digest(_saved(_Code())), r"\(UnpicklingError\)"),
        (_with_digest(_saved({"model": torch.ones(3)})), r"\(KeyError\)"),
        (_with_digest(_saved({"version": 0, "settings": {}})), "in version 0"),
    ],
    ids=["empty", "text", "foreign", "code", "signed text", "signed code", "signed foreign", "old"],
)
def test_a_file_of_another_kind_is_refused_and_kept(
    tmp_path: Path, content: bytes, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, _ = checkpoint.checkpoint_paths(tmp_path)
    newest.write_bytes(content)
    rule = "^--out must hold a checkpoint of launch.train"
    with pytest.raises(LaunchError, match=f"{rule}.* found .*checkpoint.pt.*{found}$"):
        checkpoint.restore(_plan(tmp_path), HERE)
    assert newest.read_bytes() == content
    assert capsys.readouterr().out == ""
