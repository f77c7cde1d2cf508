"""Every performance benchmark runs with --quick, finds nothing wrong, and writes what it printed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks
from benchmarks import peers, simulation
from benchmarks.cost import WORLD_SIZES, Constants, all_reduce, late, leaving, sketch, steps_of_a_ballot
from benchmarks.late import verdict_of
from benchmarks.measure import read_runs, write_json
from gaf_ddp.ballots.verdict import Verdict

ROOT = Path(benchmarks.__file__).parent.parent


def run(module: str, output: Path, *arguments: str, ranks: int | None = 2) -> Any:
    """Run a benchmark with --quick, under torchrun unless ranks is None; return its JSON."""
    launcher = [] if ranks is None else ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, module, "--quick", "--json", str(output), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


@pytest.mark.job
def test_collectives(tmp_path: Path) -> None:
    result = run("benchmarks.collectives", tmp_path / "out.json")
    assert {row["collective"] for row in result["rows"]} == {
        "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "gaf_late", "gaf_sketch",
        "gaf_sharded", "gaf_gather",
    }  # fmt: skip
    assert all(row["wrong"] == 0 and row["time_us"] > 0 for row in result["rows"])
    assert result["hardware"]["world_size"] == 2


@pytest.mark.job
def test_step_time(tmp_path: Path) -> None:
    result = run("benchmarks.step_time", tmp_path / "out.json", "--interface", "lo")
    rows = {row["hook"]: row for row in result["rows"]}
    assert rows["ddp"]["backward"]["median"] == 1
    assert all(rows[hook]["backward_ms"] > 0 for hook in ("gaf", "gaf-bucket-sharded"))


def test_runs_are_appended_to_those_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"W": 1}, [])
    write_json(path, {"W": 2}, [], append=True)
    write_json(path, {"W": 3}, [], append=True)
    assert [result["hardware"]["W"] for result in read_runs(path)] == [1, 2, 3]


@pytest.mark.job
def test_step_time_rejects_an_unknown_hook(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]
    command += ["benchmarks.step_time", "--model", "transformer", "--hooks", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "--hooks must be among ddp, noop" in done.stderr
    assert "found nonsense" in done.stderr


@pytest.mark.job
def test_filtering(tmp_path: Path) -> None:
    result = run("benchmarks.filtering", tmp_path / "out.json", "--device", "cpu", ranks=None)
    assert {row["W"] for row in result["rows"]} == {2, 8}
    assert all(
        row["GBps"][name] > 0 for row in result["rows"] if "GBps" in row for name in ("fold", "scale", "correct")
    )
    assert all(row["decision_us"]["draw"] > 0 for row in result["rows"] if "decision_us" in row)


@pytest.mark.job
def test_scaling(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("benchmarks.scaling", tmp_path / "out.json", "--plot", str(tmp_path / "out.png"))
    rows = {row["W"]: row for row in result["rows"]}
    assert sorted(rows) == [2**i for i in range(1, 11)]
    assert rows[2]["measured"]["sharded"] > 0
    assert rows[2]["measured"]["sketch"] > 0
    assert rows[2]["measured"]["late"] > 0
    assert rows[1024]["verdict_us"] > 0
    # The model's bytes: an all-reduce's, and to the bucket's the Gramian's, a triangle beyond 64 ranks, and a row.
    assert rows[64]["sharded"]["bytes_ratio"] == pytest.approx(1 + 8 * (64**2 + 64) / 2**20)
    assert rows[128]["sharded"]["bytes_ratio"] == pytest.approx(1 + 8 * (128 * 129 / 2 + 128) / 2**20)
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.job
def test_scaling_by_ranks_per_host(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    more = ("--plot", str(tmp_path / "out.png"), "--ranks-per-host", "4", "8")
    few, many = run("benchmarks.scaling", tmp_path / "out.json", *more)
    assert [row["W"] for row in few["rows"]] == [2**i for i in range(3, 11)]
    assert many["rows"][-1]["sharded"]["bytes_ratio"] > few["rows"][-1]["sharded"]["bytes_ratio"] > 3.9
    assert (tmp_path / "out.png").stat().st_size > 10_000


FREE = Constants(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(WORLD_SIZES, 0.0), dict.fromkeys(WORLD_SIZES, 0.0))


@pytest.mark.parametrize(("ranks", "measured"), [(4, 1.011), (2, 1.008)])
def test_sketches_send_what_was_measured_of_resnet18(ranks: int, measured: float) -> None:
    """45 MB in DDP's three buckets, eight ranks; cost.md has what was measured."""
    bucket = 44.7e6 / 3
    ratio = sketch(8, bucket, FREE, ranks).bytes_sent / all_reduce(8, bucket, FREE).bytes_sent
    assert ratio == pytest.approx(measured, abs=0.0025)


@pytest.mark.parametrize(("world", "steps"), [(8, 1), (16, 1), (64, 4), (1024, 8)])
def test_one_step_late_sends_a_share_and_ballots_beside_an_all_reduce(world: int, steps: int) -> None:
    size = 25 * 2**20
    assert steps_of_a_ballot(world, size) == steps
    more = late(world, size, FREE).bytes_sent - all_reduce(world, size, FREE).bytes_sent
    assert more == pytest.approx(2 * (world - 1) / world * 16 + 4 * 4096 * (world - 1) / steps)


def test_what_is_timed_beside_peers_averages(capsys: pytest.CaptureFixture[str]) -> None:
    rows = torch.randn(8, 16_000)
    for step in peers.ours(rows).values():
        step()
        step()  # a rank's own gradient is not used up
    with pytest.raises(SystemExit):
        peers.main(["--ranks", "6"])
    assert "minority of --ranks, found 3 of 6" in capsys.readouterr().err


def test_a_verdict_that_is_timed_keeps_everyone_every_time() -> None:
    parts = verdict_of(8, torch.device("cpu"))
    for _ in range(60):
        verdict = parts["draw"]()
        assert isinstance(verdict, Verdict)
        assert verdict.kept.all()
    tallied = parts["tally"]()
    assert isinstance(tallied, torch.Tensor)
    assert tallied.shape == (16, 16)


@pytest.mark.parametrize(("hosts", "ranks", "measured"), [(4, 1, 1.0), (2, 2, 1.166), (2, 4, 1.642), (4, 2, 1.357)])
def test_what_leaves_a_host_is_what_was_measured(hosts: int, ranks: int, measured: float) -> None:
    assert leaving(hosts * ranks, ranks) == pytest.approx(measured, abs=0.002)


@pytest.mark.job
def test_pictures_of_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for path in (ROOT / "benchmarks" / "results").glob("*_gloo*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    command = [sys.executable, "-m", "benchmarks.pictures", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=100)
    for name in ("collectives.png", "step_time.png", "batch.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.job
def test_simulated_ranks_with_wrong_labels_are_left_out(tmp_path: Path) -> None:
    rows: list[str] = []
    page = tmp_path / "simulation.md"
    simulation.main(["--world-sizes", "32", "--steps", "140", "--out", str(page)], rows.append)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    kept = {(who, bad): shares for _, who, bad, _, *shares in (cell[:6] for cell in cells)}
    alone = {("ranks", bad): ["0 %", "100 %"] for bad in ("1", "8")}
    hosts = {("4 hosts of 8", "8"): ["0 %", "100 %"]}
    assert {name: kept[name] for name in (*alone, *hosts)} == {**alone, **hosts}
    assert kept["averaging", "8"] == ["100 %", "100 %"]
    assert all(row in page.read_text() for row in rows)
