"""GitHub's files: they run what .ci/run does on the lowest and the newest Python, and its forms are whole."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
GITHUB = REPOSITORY / ".github"


def _read(path: Path) -> Any:
    return pytest.importorskip("yaml", reason="reading the file needs PyYAML").safe_load(path.read_text())


def test_ci_runs_on_the_lowest_and_the_newest_python() -> None:
    jobs = _read(GITHUB / "workflows" / "ci.yml")["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    found = {step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})}
    named = re.findall(r'Python :: (3\.\d+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert found == {named[0], named[-1]}
    assert [step["run"] for step in jobs["all"]["steps"] if "run" in step][-1] == "bash .ci/run"


def test_commands_of_the_workflow_for_python_3_10_are_those_of_ci() -> None:
    ours = (REPOSITORY / ".ci" / "run").read_text()
    for step in _read(GITHUB / "workflows" / "ci.yml")["jobs"]["oldest"]["steps"]:
        for check in re.findall(r"\.venv/bin/(ruff check \.|ruff format --check \.|mypy)", step.get("run", "")):
            assert f".venv/bin/{check}\n" in ours


@pytest.mark.parametrize("name", ["bug.yml", "wish.yml"])
def test_forms_ask_with_names_of_their_own(name: str) -> None:
    form = _read(GITHUB / "ISSUE_TEMPLATE" / name)
    assert {"name", "description", "body"} <= form.keys()
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint_finds_nothing() -> None:
    checked = subprocess.run(["actionlint"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
