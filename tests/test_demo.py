"""python -m gaf_ddp.demo: real ranks, a log that names the bad one, and bad flags in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gaf_ddp.demo import parse, points
from gaf_ddp.monitor.absences import absences
from gaf_ddp.monitor.log_reader import read
from tests.launch.jobs import environment


def run(folder: Path, *arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "gaf_ddp.demo", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=True
    )


def rows(out: str) -> dict[str, list[str]]:
    """Return the numbers and words of the table's rows, by method."""
    found = [line.replace("%", "").split() for line in out.splitlines()]
    return {cells[0]: cells[1:] for cells in found if cells and cells[0] in ("averaging", "GAFState()")}


@pytest.mark.job
def test_finds_the_bad_rank_and_learns_more_without_it(tmp_path: Path) -> None:
    ended = run(tmp_path, "--ranks", 3, "--steps", 120, "--bad-rank", 2)
    table = rows(ended.stdout)
    accuracy, *kept = map(float, table["GAFState()"])
    assert accuracy > float(table["averaging"][0]) + 5
    assert kept[2] < 40
    assert min(kept[:2]) > 85
    (absence,) = [each for each in absences(read(tmp_path / "agreement.jsonl")) if each.until is None]
    assert absence.rank == 2


@pytest.mark.job
def test_runs_under_torchrun_and_without_a_bad_rank(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    ended = run(tmp_path, "--steps", 20, "--bad-rank", -1, "--out", "fine.jsonl", launcher=launcher)
    assert "!" not in ended.stdout
    assert len(rows(ended.stdout)) == 2
    lines = [json.loads(line) for line in (tmp_path / "fine.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))


def test_data_are_the_same_for_a_seed_and_hold_all_classes() -> None:
    (inputs, labels), (again, _), (others, _) = points(500, 7), points(500, 7), points(500, 8)
    assert inputs.equal(again)
    assert not inputs.equal(others)
    assert labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "2"], "--ranks must be 3 to 64"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--bad-rank", "4"], "--bad-rank must be one of the 4 ranks or -1"),
        (["--out", "/no/such/folder/log"], "--out must be a file in an existing folder"),
    ],
)
def test_bad_flags_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, None)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--ranks", "4"], 3)
    assert "--ranks must be torchrun's 3 or left out, found 4" in capsys.readouterr().err
