"""Records, what is summed up from them, the table, the files and the picture."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from launch.picture import COLOURS, WRONG, draw
from launch.records import Record, result, results
from launch.report import FullReport, tabulate
from launch.settings import Plan
from tests.launch.jobs import make_plan


def _record(method: str = "tau", seed: int = 0, step: int = 20, accuracy: float = 50.0, **other: object) -> Record:
    values = {"loss": 1.0, "lr": 0.1, "skipped": 0.1, "kept": [0.9, 0.2, 0.9, 0.8], "cosine": 0.1}
    return Record(method=method, seed=seed, step=step, accuracy=accuracy, **{**values, **other})  # type: ignore[arg-type]


def _run(plan: Plan) -> list[Record]:
    gain = {"average": 0.0, "tau": 5.0, "consensus": 6.0, "paper": 3.0}
    return [
        _record(method, seed, step, 80 + gain[method] + seed + step / 40, kept=[0.9] * plan.world)
        for seed, method in plan.runs
        for step in range(20, 401, 20)
    ]


def test_final_is_the_mean_of_the_last_three() -> None:
    summed = result([_record(step=20 * n, accuracy=a) for n, a in enumerate([99, 60, 80, 90, 70], 1)])
    assert summed.final == 80
    assert summed.best == 99


def test_shares_count_steps_not_evaluations() -> None:
    """30 steps at 0.0 and 10 at 1.0 are a share of 0.25."""
    records = [_record(step=30, skipped=0.0, kept=[0.0, 1.0]), _record(step=40, skipped=1.0, kept=[1.0, 1.0])]
    assert result(records).skipped == pytest.approx(0.25)
    assert result(records).kept == pytest.approx([0.25, 1.0])


def test_ranks_that_left_the_job_are_left_out() -> None:
    assert result([_record(step=20), _record(step=40, kept=[0.7, 0.2])]).kept == pytest.approx([0.8, 0.2])


def test_results_are_grouped_by_method_with_one_per_seed() -> None:
    outcome = results(_run(make_plan("--seeds", 3)))
    assert {method: [run.seed for run in runs] for method, runs in outcome.items()} == {
        "average": [0, 1, 2],
        "tau": [0, 1, 2],
        "consensus": [0, 1, 2],
    }


def test_a_record_is_one_line_of_json_even_with_nan() -> None:
    line = _record(loss=float("nan"), cosine=None).as_json()
    assert "\n" not in line
    read = json.loads(line, parse_constant=pytest.fail)
    assert read["loss"] is None
    assert read["kept"] == [0.9, 0.2, 0.9, 0.8]


def test_table_of_one_seed() -> None:
    records = [_record("average", kept=[1.0] * 4, skipped=0.0, accuracy=42.0), _record("tau", accuracy=84.0)]
    assert tabulate(results(records), make_plan("--seeds", 1)).splitlines() == [
        "   method  final accuracy  best  skipped  kept: rank 0  rank 1!  rank 2  rank 3",
        "averaging            42.0  42.0       0%          100%     100%    100%    100%",
        "      tau            84.0  84.0      10%           90%      20%     90%     80%",
        "final: mean of the last 3 evaluations, in percent of clean test data; !: trains on wrong labels",
    ]


def test_table_of_several_seeds_shows_the_deviation() -> None:
    records = [_record(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate([80.0, 90.0, 85.0])]
    table = tabulate(results(records), make_plan("--seeds", 3, "--method", "tau"))
    assert "85.0 ± 5.0" in table
    assert "over 3 seeds" in table


def test_table_says_what_to_do_when_most_steps_are_skipped() -> None:
    plan = make_plan()
    texts = [tabulate(results([_record(skipped=share)]), plan) for share in (0.4, 0.6)]
    assert ["tau skipped most steps: a larger --tau or --batch-size may help" in text for text in texts] == [
        False,
        True,
    ]


def test_table_of_many_ranks_has_a_column_for_each_kind() -> None:
    plan = make_plan("--corrupt-ranks", "3,17", world=32)
    records = [_record(kept=[0.1 if rank in (3, 17) else 0.8 for rank in range(32)])]
    head, row, _ = tabulate(results(records), plan).splitlines()
    assert head.split("  ")[-2:] == ["kept: ranks", "kept: wrong!"]
    assert row.split()[-2:] == ["80%", "10%"]


@pytest.mark.parametrize(
    ("arguments", "world"),
    [
        ([], 4),
        (["--method", "average", "--corrupt-ranks", "none", "--seeds", 1], 1),
        (["--compare", "average,tau,consensus,paper", "--corrupt-ranks", "0,3,6", "--label-noise", 0.4], 8),
        (["--method", "tau", "--corrupt-ranks", "3,17"], 64),
    ],
)
def test_picture_is_drawn_for_every_kind_of_job(tmp_path: Path, arguments: list[object], world: int) -> None:
    plan = make_plan(*arguments, world=world)
    draw(_run(plan), plan, tmp_path / "agreement.png")
    with Image.open(tmp_path / "agreement.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).view(-1, 3)
    expected = {COLOURS[method]: method in plan.methods for method in COLOURS}
    expected[WRONG] = bool(plan.corrupt_ranks) and plan.methods != ("average",)
    for colour, shown in expected.items():
        count = (pixels == torch.tensor(list(bytes.fromhex(colour[1:])))).all(1).sum()
        assert (count > 200) == shown  # a few pixels of any colour come from smooth edges


def test_report_leaves_every_file_and_shows_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan("--seeds", 1, out=tmp_path)
    report, records = FullReport(plan, []), _run(plan)
    for seed, method in plan.runs:
        report.begin(seed, method, 0)
        for record in records:
            if record.method == method:
                report.add(record)
        report.end()
    report.finish(records)
    lines = (plan.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(20, 401, 20)] * 3
    assert json.loads((plan.out / "settings.json").read_text())["corrupt_ranks"] == [1]
    assert (plan.out / "agreement.png").stat().st_size > 10_000
    assert len(list(plan.out.glob("tensorboard/*/events.*"))) == 3
    shown = capsys.readouterr()
    assert (plan.out / "table.txt").read_text() in shown.out
    assert "tau, seed 0: step 400/400, accuracy 95.0 %" in shown.err


def test_report_of_a_resumed_job_starts_from_its_records(tmp_path: Path) -> None:
    plan = make_plan("--seeds", 1, out=tmp_path)
    (tmp_path / "metrics.jsonl").write_text("what the stopped job wrote after its checkpoint\n")
    FullReport(plan, [_record()]).finish([_record(method) for method in plan.methods])
    assert (tmp_path / "metrics.jsonl").read_text() == _record().as_json() + "\n"
