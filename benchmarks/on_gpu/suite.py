"""Stage 1: the tests that run on a GPU, by pytest in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.on_gpu.job import Job
from benchmarks.on_gpu.processes import ROOT

# Compilations and interpreted kernels need no GPU, and are tested without one.
_NO_GPU = ("-k", "not spill and not interpreter", "--ignore=tests/kernels/test_compiled.py")
TESTS = {
    "hook": ("tests/test_cuda.py", "tests/monitor/test_pending.py"),
    "kernels": ("tests/kernels", *_NO_GPU),
}
REHEARSED = {"hook": ("tests/test_cuda.py",), "kernels": ("tests/kernels/test_signs.py",)}
_MOST = {"hook": 4, "kernels": 8}  # processes at a time
_SAID = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
_RESULT = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] ({'|'.join(_SAID)}) (tests/.+)|(tests/.+?) ({'|'.join(_SAID)})\b.*)$")
_BROKEN = re.compile(r"^ERROR (tests/\S+)")  # a file that cannot be imported


def run(job: Job) -> None:
    """Run a part's tests and count."""
    chosen = (REHEARSED if job.rehearse else TESTS)[job.part]
    # Most of their time goes into compiling, and into starting ranks. A hung rank is reported by its test, after 90 s.
    spread = ["-n", "0"] if job.rehearse else ["-n", str(min(_MOST[job.part], os.cpu_count() or 1)), "--dist", "load"]
    line = ["-v", "-rfE", *spread, "-p", "no:cacheprovider", "--timeout=110", "--color=no", *chosen]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "said"
        code = _pytest(line, output, max(job.left(), 1))
        said = output.read_text(errors="replace")
    print(said)
    results = read_results(said)
    row = {"tests": job.part, **{name: list(results.values()).count(name.upper()) for name in _COLUMNS}}
    job.rows.add(row)
    bad = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
    if bad:
        job.rows.note("Failed: " + ", ".join(f"`{name}`" for name in bad))
        job.rows.fail(f"{len(bad)} failed")
    if code is None:
        last = said.rstrip().splitlines()[-1:] or ["nothing"]
        job.rows.fail(f"not done in time; the last that pytest said: {last[0][:200]}")
    elif code != 0 and not bad:
        job.rows.fail(f"pytest ended with exit code {code}: {' '.join(said.split()[-40:])}")


_COLUMNS = ("passed", "failed", "error", "skipped")


def read_results(said: str) -> dict[str, str]:
    """Return what became of each test, from what `pytest -v` printed, whole or cut off."""
    results: dict[str, str] = {}
    for line in said.splitlines():
        if found := _RESULT.match(line):
            early, name, other, late = found.groups()
            results[name or other] = early or late
        elif broken := _BROKEN.match(line):
            results.setdefault(broken.group(1), "ERROR")
    return results


def _pytest(line: list[str], output: Path, seconds: float) -> int | None:
    """Return pytest's exit code, None where it was ended; what it printed is in output then too."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with output.open("wb") as file:
        command = [sys.executable, "-u", "-m", "pytest", *line]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
    return done.returncode
