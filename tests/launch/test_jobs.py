"""Whole jobs on real ranks: the science in small, resuming to the bit, and errors that reach every rank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.ranks import LaunchError, together
from launch.records import Record, Result, results
from launch.trainer import Trainer
from tests.launch.jobs import Outcome, RunRanks, rank_of_job, run_job, run_job_until_power_cut
from tools.ranks import RankError


def _results(folder: Path) -> dict[str, list[Result]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return results(Record(**json.loads(line)) for line in lines)


def _checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


def _assert_same(one: Any, other: Any, path: str = "") -> None:
    """Hold both to the same structure, and to tensors of the same bits."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            _assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            _assert_same(left, right, f"{path}/{number}")
    else:
        assert one == other, path


def test_filter_beats_averaging_and_the_paper_needs_a_good_first_rank(
    gloo_ranks: RunRanks, tmp_path: Path
) -> None:
    """The demonstration in small, with wrong labels on rank 0.

    On 4 ranks, over 3 seeds and 400 steps, the final accuracies are about 91, 96 (GAF) and 61 (paper).
    """
    job = ["--compare", "average,gaf,paper", "--corrupt-ranks", 0, "--seeds", 1, "--batch-size", 26]
    outcomes = run_job(gloo_ranks, 3, [*job, "--steps", 150, "--out", tmp_path])
    assert [outcome.code for outcome in outcomes] == [0] * 3
    final = {method: runs[0].final for method, runs in _results(tmp_path).items()}
    assert final["gaf"] > final["average"] + 1.5
    assert final["paper"] < final["average"] - 10
    kept = _results(tmp_path)["gaf"][0].kept
    assert kept[0] < min(kept[1:]) - 0.2
    assert all(name in outcomes[0].out for name in ("averaging", "GAF", "paper's GAF", "rank 0!"))
    assert [outcome.out for outcome in outcomes[1:]] == [""] * 2


# Its gradient fills several buckets, so that DDP's rebuilding of them after the first step matters.
SEVERAL_BUCKETS = ["--data", "fake", "--image-size", 32, "--model", "mlp", "--corrupt-ranks", 1, "--seeds", 1]
SEVERAL_BUCKETS += ["--steps", 12, "--eval-every", 2, "--checkpoint-every", 4, "--batch-size", 4, "--augment"]


def _resume(ranks: RunRanks, world: int, folder: Path, saves: int, *job: object) -> None:
    arguments = [*job, "--out", folder, "--resume"]
    with pytest.raises(RankError, match="rank 0: died with exit code 9"):
        run_job_until_power_cut(ranks, world, arguments, saves)
    (outcome, *_) = run_job(ranks, world, arguments)
    assert "going on with run" in outcome.err
    assert outcome.code == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunRanks], Path]:
    """Return the folder of a job that ran without a stop; made by the first test that asks."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def get(ranks: RunRanks) -> Path:
        if not (folder / "checkpoint.pt").exists():
            run_job(ranks, 3, [*SEVERAL_BUCKETS, "--out", folder])
        return folder

    return get


@pytest.mark.parametrize("saves", [1, 4], ids=["in the first method", "in the second method"])
def test_a_resumed_job_ends_with_the_same_bits(
    gloo_ranks: RunRanks, tmp_path: Path, uninterrupted: Callable[[RunRanks], Path], saves: int
) -> None:
    whole = uninterrupted(gloo_ranks)
    _resume(gloo_ranks, 3, tmp_path, saves, *SEVERAL_BUCKETS)
    _assert_same(_checkpoint(tmp_path)["trainer"], _checkpoint(whole)["trainer"])
    for name in ("metrics.jsonl", "table.txt"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()


def test_a_job_can_go_on_with_fewer_ranks(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    job = [
        "--seeds",
        1,
        "--steps",
        40,
        "--corrupt-ranks",
        0,
        "--checkpoint-every",
        20,
        "--out",
        tmp_path,
        "--resume",
    ]
    with pytest.raises(RankError):
        run_job_until_power_cut(gloo_ranks, 3, job, saves=3)
    assert [outcome.code for outcome in run_job(gloo_ranks, 2, job)] == [0, 0]
    last = _results(tmp_path)["gaf"][0]
    assert len(last.kept) == 2
    assert last.final > 60


def test_a_finished_job_is_shown_again_and_not_overwritten(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    job = ["--seeds", 1, "--steps", 4, "--out", tmp_path]
    first, again = (run_job(gloo_ranks, 2, [*job, *resume])[0].out.splitlines() for resume in ([], ["--resume"]))
    assert first[:-1] == again[:-1]  # the last line tells the time it took
    refused = run_job(gloo_ranks, 2, job)
    assert [outcome.code for outcome in refused] == [2, 2]
    assert "--out must be a new folder, or be given with --resume" in refused[0].err


def test_other_options_work_together(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    job = "--data digits --model conv --augment --label-noise 0.2 --corrupt-ranks none --compare gaf,average "
    job += "--scope bucket --exchange gather --wire-dtype bf16 --max-norm-ratio none --start-step 3 --tau 1.2 "
    job += "--optimizer adamw --lr 0.002 --schedule cosine --amp bf16 --epochs 0.2 --seeds 2 --seed 7"
    job += " --vote-momentum 0.9"
    assert [outcome.code for outcome in run_job(gloo_ranks, 2, [*job.split(), "--out", tmp_path])] == [0, 0]
    outcome = _results(tmp_path)
    assert {method: [run.seed for run in runs] for method, runs in outcome.items()} == {
        "gaf": [7, 8],
        "average": [7, 8],
    }
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["lr"] == 0  # the end of the cosine


def test_one_rank_trains_alone(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    (outcome,) = run_job(gloo_ranks, 1, ["--seeds", 1, "--steps", 60, "--out", tmp_path])
    assert outcome.code == 0
    finals = [runs[0].final for runs in _results(tmp_path).values()]
    assert finals[0] == finals[1] > 60  # nothing to filter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", 3], "--tau: must be a number in [0, 2], found '3'"),
        (["--corrupt-ranks", 9], "--corrupt-ranks must be ranks in [0, 2], found 9"),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "--data-dir must hold train/ and test/"),
        (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs CUDA, found cpu"),
        (["--out", __file__], "--out must be a folder this job can write"),
    ],
)
def test_a_wrong_setting_ends_every_rank_with_one_message(
    gloo_ranks: RunRanks, arguments: list[object], message: str
) -> None:
    outcomes = run_job(gloo_ranks, 3, arguments, timeout=30)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2]
    assert message in outcomes[0].err
    assert outcomes[0].err.count("launch.train: error:") == 1
    assert [outcome.err for outcome in outcomes[1:]] == ["", ""]


def _fail_on_rank_1(device: torch.device) -> str:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise OSError("disk on fire")

    with pytest.raises(LaunchError) as caught:
        together(fail)
    assert isinstance(caught.value.__cause__, OSError) == (dist.get_rank() == 1)
    return str(caught.value)


def test_a_problem_on_one_rank_reaches_all(gloo_ranks: RunRanks) -> None:
    assert gloo_ranks(3, _fail_on_rank_1) == ["on rank 1: OSError: disk on fire"] * 3


def _break_in_training(device: torch.device, port: int, arguments: list[str]) -> Outcome:
    real_backward = Trainer._backward

    def backward(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.here.rank == 1 and self.state is not None and self.state.step == 3:
            raise MemoryError("no room left")
        return real_backward(self, images, labels)

    Trainer._backward = backward  # type: ignore[method-assign]
    return rank_of_job(device, port, arguments)


def test_an_error_in_training_leaves_no_rank_hanging(gloo_ranks: RunRanks, tmp_path: Path) -> None:
    arguments = ["--method", "gaf", "--steps", "50", "--out", str(tmp_path)]
    with pytest.raises(RankError) as caught:
        run_job(gloo_ranks, 3, arguments, body=_break_in_training)
    assert {rank: text for rank, text in caught.value.failures.items() if "exit code 1" not in text} == {}
