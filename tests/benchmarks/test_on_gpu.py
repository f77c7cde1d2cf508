"""The run for a lent GPU: it can be rehearsed without one, and what hangs, dies or is refused is told and no more."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.on_gpu import __main__, graph, processes
from benchmarks.on_gpu.launches import Event, counted
from benchmarks.on_gpu.page import Outcome, page
from benchmarks.on_gpu.processes import ROOT, run_processes
from benchmarks.on_gpu.rows import Rows, read_rows
from benchmarks.on_gpu.stages import STAGES
from benchmarks.on_gpu.suite import read_results


@pytest.mark.job
@pytest.mark.timeout(400)
def test_a_rehearsal_has_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "on_gpu.md"
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--rehearse", "--minutes", "5", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=350)
    text = out.read_text()
    assert done.returncode == 0, done.stdout + done.stderr + text
    assert [line[6:] for line in text.splitlines() if line.startswith("## ")] == [stage.title for stage in STAGES]
    assert "Left out: launches needs a GPU" in text
    assert "Left out: graph needs a GPU" in text
    assert "Left out: there is no --data-dir" in text
    for row in ("| hook | 0 | 0 | 0 |", "| kernels | ", "combine, W = 8", "autocast | 1 | gloo", "autocast | 2 | gloo"):
        assert row in text
    assert str(ROOT) not in text


def test_without_a_gpu_it_stops_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--out", "page.md"])
    with pytest.raises(SystemExit) as end:
        __main__.arguments()
    assert end.value.code == 2
    assert "a GPU is needed, and torch finds none here" in capsys.readouterr().err


def is_alive(number: int) -> bool:
    """Return whether a process is neither gone nor a zombie."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def test_ranks_that_hang_are_ended_with_what_they_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    wrong, said = run_processes(["-c", child], 1, 2.0, tmp_path, {})
    assert wrong == "not done in 2 s, and ended"
    until = time.monotonic() + 20.0  # it takes a moment to die
    while is_alive(int(said)):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_rank_that_dies_is_told_and_takes_the_others_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    body = (
        "import os, time; print('I am', os.environ['RANK']); os.environ['RANK'] == '1' and os._exit(3); time.sleep(60)"
    )
    wrong, said = run_processes(["-u", "-c", body], 2, 30.0, tmp_path, {})
    assert wrong == "rank 1 ended with exit code 3"
    assert said == "I am 1\n"


def test_rows_outlive_an_error(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json")
    rows.add({"first": 1})
    with rows.attempt("the second"):
        int("no  more")
    found = read_rows(tmp_path / "rows.json")
    assert (found.rows, found.errors) == (
        [{"first": 1}],
        ["the second: ValueError: invalid literal for int() with base 10: 'no more'"],
    )
    assert read_rows(tmp_path / "missing").rows == []


def test_results_are_read_of_a_run_that_was_cut_off() -> None:
    said = """
tests/a.py::test_x[{'tau': 0.9, 'scope': 'bucket'}-1] PASSED [  3%]
tests/a.py::test_y FAILED                                [  6%]
[gw1] [ 50%] SKIPPED tests/b.py::test_z[Mean()-2]
[gw0] [ 53%] ERROR tests/b.py::test_w
ERROR tests/c.py - ModuleNotFoundError: No module named 'x'
FAILED tests/a.py::test_y - assert False
tests/a.py::test_hangs """
    assert read_results(said) == {
        "tests/a.py::test_x[{'tau': 0.9, 'scope': 'bucket'}-1]": "PASSED",
        "tests/a.py::test_y": "FAILED",
        "tests/b.py::test_z[Mean()-2]": "SKIPPED",
        "tests/b.py::test_w": "ERROR",
        "tests/c.py": "ERROR",
    }


def test_launches_are_counted_where_the_hook_is() -> None:
    names = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaEventRecord", "aten::mul")
    inside = [Event(name, 10.0 + place, 11.0 + place) for place, name in enumerate(names)]
    marks = [Event("gaf bucket 0", 9, 16), Event("gaf bucket 1", 16, 20), Event("gaf backward", 1, 30)]
    assert counted([*inside, *marks, Event("cudaMemsetAsync", 25, 26), Event("cudaLaunchKernel", 40, 41)]) == (
        {0: 3, 1: 0},
        4,
    )


def test_the_page_says_what_failed_without_this_machines_folders() -> None:
    outcome = Outcome([{"a": 1.23456, "b": 12345.6}, {"c": "x|y"}], ["noted"], [("part: gone", f"at {ROOT}/tests")])
    text = page({"device": "none"}, {"tests": outcome, "graph": Outcome(skipped="no reason")})
    for part in ("| 1.23 | 12346 |  |", "x\\|y", "noted", "**Failed**: part: gone", "at tests", "Left out: no reason."):
        assert part in text
    assert "Not run yet." in text


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (None, ("works: the loss is", True)),
        ("backward must not be captured in a CUDA graph: …", ("refused by name: RuntimeError: backward must", True)),
        ("something else", ("failed: ValueError: the capture was broken", False)),
    ],
)
def test_a_refused_capture_is_told_from_a_broken_one(
    raised: str | None, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def captured(_: object) -> Iterator[None]:
        try:
            if raised is not None:
                raise RuntimeError(raised)
            yield
        finally:
            if raised is not None:
                raise ValueError("the capture was broken")  # as torch's own end of a capture does

    fakes: dict[str, Any] = {"Stream": lambda device: None, "stream": lambda side: nullcontext(), "graph": captured}
    fakes |= {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "synchronize": lambda *device: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graph, "hooks", lambda: {"ddp": None})
    monkeypatch.setattr(graph, "wrap", lambda hook, model, device: model)
    said, fine = graph.capture(torch.device("cpu"), with_hook=False)
    assert (said.startswith(expected[0]), fine) == (True, expected[1]), said
