"""The accuracy benchmark as a whole: a short form runs, resumes, and both engines compute the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.arms import ARMS, runs_of
from benchmarks.accuracy.declare import PAST, Fault, Rule, Run
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.one_process import OneProcess
from benchmarks.accuracy.real_ranks import train_rank
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.task import build_task
from benchmarks.accuracy.training import Record, train
from benchmarks.accuracy.work import make

CONSENSUS = Rule("consensus", 4096.0)
SHORT = Run("digits", "mlp", (0, 1, 2), 16, steps=30, lr=0.05, evaluate_every=10)

Case = tuple[Run, tuple[int, ...]]  # and how many ranks the run that it repeats kept


def alone(run: Run, counts: tuple[int, ...] = ()) -> Record:
    task = build_task(run, None)
    ranks = OneProcess(run, task, counts)
    return train(run, task, ranks.model, ranks.step)


@pytest.mark.job
def test_quick_writes_table_and_picture_and_resumes(tmp_path: Path) -> None:
    command = ["--experiments", "shift w3 bad 1", "--quick", "--jobs", "2", "--out", str(tmp_path)]
    main(command)
    lines = (tmp_path / "accuracy_runs.jsonl").read_text()
    page = (tmp_path / "accuracy_shift.md").read_text()
    assert "NeighborhoodAgreement, tau 0.9" in page
    assert "random members" in page
    assert "on DDP ranks" in page
    assert (tmp_path / "accuracy_shift.png").stat().st_size > 10_000

    main(command)  # nothing is left to do
    assert (tmp_path / "accuracy_runs.jsonl").read_text() == lines
    engines = {json.loads(line)["run"].get("engine", "one process") for line in lines.splitlines()}
    assert engines == {"one process", "ddp"}


def train_all(device: torch.device, cases: list[Case]) -> list[Record]:
    return [train_rank(device, run, None, counts) for run, counts in cases]


@pytest.mark.job
def test_real_ranks_compute_what_one_process_does(gloo_ranks: Callable[..., list[Any]]) -> None:
    shifted = replace(EXPERIMENTS["shift w3 bad 1"].base, steps=30, evaluate_every=10)
    counts = (3, 0, 2) * 10
    cases: list[Case] = [
        (shifted, ()),
        (replace(shifted, rule=Rule("neighborhood", 0.9)), ()),
        (replace(shifted, rule=Rule("random members", like=Rule("neighborhood", 0.9))), counts),
        (replace(shifted, rule=CONSENSUS), ()),
        (replace(SHORT, fault=Fault("NaN", 1), rule=CONSENSUS), ()),
        (replace(SHORT, fault=Fault("x1000", 2), rule=CONSENSUS), ()),
        (replace(SHORT, fault=Fault("inner product", 1)), ()),
        (replace(SHORT, fault=Fault("a little is enough", 0), rule=Rule("upgrad")), ()),
        (replace(SHORT, fault=Fault("stuck at its first", 2), rule=Rule("sequential", 0.9)), ()),
    ]
    for (run, replayed), real in zip(cases, gloo_ranks(3, train_all, cases)[0], strict=True):
        single = alone(run, replayed)
        assert real["counts"] == single["counts"], run
        assert real["curve"] == pytest.approx(single["curve"], abs=1.0), run


def test_the_same_declaration_gives_the_same_record() -> None:
    run = replace(SHORT, rule=Rule("neighborhood", 0.9))
    first, second = alone(run), alone(run)
    assert first["curve"] == second["curve"]
    assert first["counts"] == second["counts"]


def test_a_diverged_run_keeps_its_last_accuracy() -> None:
    record = alone(replace(SHORT, fault=Fault("NaN", 0)))
    assert len(record["curve"]) == 3
    assert record["final"] < 20


@pytest.mark.parametrize(("kind", "kept"), [("NaN", 0.0), ("x(-10)", 0.2), ("inner product", 0.2)])
def test_consensus_leaves_out_a_broken_rank_one_step_late(kind: str, kept: float) -> None:
    record = alone(replace(SHORT, ranks=tuple(range(5)), fault=Fault(kind, 0), rule=CONSENSUS))
    assert record["kept_by_rank"][0] <= kept
    assert min(record["kept_by_rank"][1:]) == 1
    assert record["final"] > 60


def test_past_rules_are_not_made_again(tmp_path: Path) -> None:
    make(runs_of(EXPERIMENTS["shift w3 bad 1"], f"consensus{PAST}"), Store(tmp_path / "runs.jsonl"), None, 1)
    assert not (tmp_path / "runs.jsonl").exists()


def test_names_and_declarations_are_unique() -> None:
    assert len({run.key for run in (SHORT, replace(SHORT, seed=1), replace(SHORT, lr=0.1))}) == 3
    assert all(arm in ARMS for experiment in EXPERIMENTS.values() for arm in experiment.arms)


def test_chosen_arms_alone_are_trained(tmp_path: Path) -> None:
    main(["--experiments", "shift w3 bad 1", "--arms", "default", "--quick", "--jobs", "1", "--out", str(tmp_path)])
    lines = (tmp_path / "accuracy_runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"]["rule"] for line in lines] == [{"name": "neighborhood", "parameter": 1.0}]


def test_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--experiments", "nonsense"])
    assert "nonsense" in capsys.readouterr().err
