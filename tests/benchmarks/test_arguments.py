"""Bad arguments of the benchmarks are refused before anything is measured, by name, rule and value found."""

import subprocess
import sys
import time
from importlib import import_module

import pytest

from benchmarks import on_hosts


@pytest.mark.parametrize(
    ("benchmark", "line", "message"),
    [
        ("step_time", "-n 0", "argument -n/--repeats: must be a whole number from 1, found '0'"),
        ("collectives", "-n -3", "argument -n/--repeats: must be a whole number from 1, found '-3'"),
        ("filtering", "-n many", "argument -n/--repeats: must be a whole number from 1, found 'many'"),
        ("step_time", "--batch-size 0", "argument --batch-size: must be a whole number from 1, found '0'"),
        ("step_time", "--size 0", "argument --size: must be a whole number from 1, found '0'"),
        (
            "step_time",
            "--interface eth99",
            "--interface: must be a network interface of this host, found 'eth99'",
        ),
        ("step_time", "--json /", "argument --json: must be a file, found the folder '/'"),
        (
            "step_time",
            "--json /dev/null/x.json",
            "must be a file in a folder that can be made, found '/dev/null/x",
        ),
        ("collectives", "-b 0", "argument -b/--minbytes: a size must be a positive number"),
        ("collectives", "-b 1K -e 8", "--maxbytes must be at least --minbytes, 1024, found 8"),
        ("collectives", "-f 1", "--stepfactor must be at least 2, found 1"),
        ("filtering", "--max-bytes 1000", "--max-bytes must be at least 1048576, found 1000"),
        ("scaling", "--size 1K", "--size must be at least 4K, found 1024"),
        ("on_hosts", "--hosts 0 x", "argument --hosts: must be a whole number from 1, found '0'"),
        ("on_hosts", "--hosts 300 x", "--hosts must be at most 254, found 300"),
        ("on_hosts", "--rate fast x", "argument --rate: must be a rate as in 200mbit or 1gbit, found 'fast'"),
    ],
)
def test_are_refused(
    benchmark: str,
    line: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [benchmark, *line.split()])
    with pytest.raises(SystemExit) as end:
        import_module(f"benchmarks.{benchmark}").arguments()
    assert message in capsys.readouterr().err + str(end.value)


@pytest.mark.parametrize("benchmark", ["collectives", "step_time", "filtering", "scaling", "on_hosts"])
def test_help_is_the_whole_docstring(
    benchmark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{benchmark}")
    monkeypatch.setattr(sys, "argv", [benchmark, "--help"])
    with pytest.raises(SystemExit):
        module.arguments()
    assert (module.__doc__ or "").strip() in capsys.readouterr().out


def test_hosts_end_when_one_fails() -> None:
    started = time.monotonic()
    fails = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], text=True)
    waits = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], text=True)
    assert on_hosts.wait([waits, fails]) == 3
    assert waits.returncode is not None
    assert time.monotonic() - started < 30
