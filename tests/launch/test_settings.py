"""The command line and what follows from it: defaults, and one clear message for each wrong value."""

from pathlib import Path

import pytest

from launch.cli import parse
from launch.errors import SettingsError
from launch.settings import differences
from launch.train import main
from tests.launch.jobs import make_plan


def test_the_demonstration_needs_no_arguments() -> None:
    settings = parse([])
    assert settings.data == "digits"
    assert settings.methods == ("average", "gaf", "consensus")
    assert (settings.tau, settings.scope, settings.batch_size, settings.lr) == (0.9, None, 20, 0.05)
    assert not settings.download
    demonstration = make_plan()
    assert (demonstration.model, demonstration.steps, demonstration.corrupt_ranks) == ("mlp", 400, (1,))
    assert (demonstration.eval_every, demonstration.checkpoint_every) == (20, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tau 3", r"--tau: must be a number in \[0, 2\], found '3'"),
        ("--tau nan", r"--tau: must be a number in \[0, 2\], found 'nan'"),
        ("--batch-size 0", "--batch-size: must be a whole number at least 1, found '0'"),
        ("--steps 1.5", "--steps: must be a whole number at least 1, found '1.5'"),
        ("--lr inf", "--lr: must be a number at least 0, found 'inf'"),
        ("--label-noise 1.1", r"--label-noise: must be a number in \[0, 1\], found '1.1'"),
        ("--corrupt-ranks one", "--corrupt-ranks: must be ranks as in 0,3, or none; found 'one'"),
        (
            "--compare gaf,gaf",
            "--compare: must be different methods out of average,gaf,consensus,paper; found 'gaf,gaf'",
        ),
        (
            "--compare mean",
            "--compare: must be different methods out of average,gaf,consensus,paper; found 'mean'",
        ),
        ("--data mnist", "--data: invalid choice: 'mnist'"),
        ("--max-norm-ratio 0.5", "--max-norm-ratio: must be a number at least 1, found '0.5'"),
        ("--steps 5 --epochs 1", "--epochs: not allowed with argument --steps"),
        ("--method gaf --compare", "--compare: not allowed with argument --method"),
        ("--resume", "--resume needs --out"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(arguments: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--corrupt-ranks 9", r"--corrupt-ranks must be ranks in \[0, 3\], found 9"),
        ("--corrupt-ranks=-1", r"--corrupt-ranks must be ranks in \[0, 3\], found -1"),
    ],
)
def test_contradictions_are_found_before_training(arguments: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_plan(*arguments.split())


@pytest.mark.parametrize(("text", "ranks"), [("", ()), ("none", ()), ("2", (2,)), ("3,0,3", (0, 3))])
def test_corrupt_ranks_are_a_list(text: str, ranks: tuple[int, ...]) -> None:
    assert make_plan("--corrupt-ranks", text).corrupt_ranks == ranks


def test_only_the_demonstration_corrupts_a_rank_unasked() -> None:
    assert make_plan(world=2).corrupt_ranks == ()
    assert make_plan("--data", "fake").corrupt_ranks == ()


def test_epochs_count_examples_of_all_ranks() -> None:
    assert make_plan("--epochs", 2, "--batch-size", 25, world=4, train_size=1000).steps == 20
    assert make_plan("--epochs", 0.5, "--batch-size", 300, world=4, train_size=1000).steps == 1


def test_runs_pair_the_methods_of_each_seed() -> None:
    plan = make_plan("--seed", 5, "--seeds", 2, "--compare", "average,paper")
    assert plan.runs == [(5, "average"), (5, "paper"), (6, "average"), (6, "paper")]


@pytest.mark.parametrize(
    ("method", "methods"), [("--method gaf", ("gaf",)), ("--compare", ("average", "gaf", "consensus"))]
)
def test_one_method_or_several(method: str, methods: tuple[str, ...]) -> None:
    assert parse(method.split()).methods == methods


def test_a_saved_job_goes_on_with_the_same_settings_only() -> None:
    saved = make_plan("--corrupt-ranks", "0,1").as_plain()
    assert differences(saved, make_plan("--corrupt-ranks", "0,1")) == []
    other = make_plan("--corrupt-ranks", "0,1", "--lr", 0.1, "--seeds", 1)
    assert differences(saved, other) == ["--lr (was 0.05, now 0.1)", "--seeds (was 3, now 1)"]


def test_a_saved_job_may_move_and_change_its_size() -> None:
    saved = make_plan(out=Path("here")).as_plain()
    moved = make_plan("--workers", 2, "--data-dir", "elsewhere", "--checkpoint-every", 20, world=3, out=Path("there"))
    assert differences(saved, moved) == []


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "torchrun --standalone" in shown
    assert shown.count("default: ") > 25


def test_help_is_shown_by_one_rank_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out == ""


def test_a_start_without_torchrun_says_how(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main([]) == 2
    assert "torchrun --standalone --nproc-per-node 4 -m launch.train\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("now", "run", "refused"),
    [
        (["--steps", 20], 0, []),
        (["--steps", 5], 0, ["--steps", "--eval-every"]),
        (["--steps", 20], 1, ["--steps", "--eval-every"]),
        (["--steps", 20, "--schedule", "cosine"], 0, ["--steps", "--schedule", "--eval-every"]),
        (["--steps", 20, "--lr", 0.1], 0, ["--lr"]),
    ],
    ids=["more", "fewer", "an earlier run has ended", "the schedule has ended", "other settings"],
)
def test_a_job_in_its_first_run_can_get_more_steps(now: list[object], run: int, refused: list[str]) -> None:
    saved = make_plan("--steps", 10, "--eval-every", 3).as_plain()
    assert [each.split(" (")[0] for each in differences(saved, make_plan(*now), run)] == refused
