"""The page: one section and one table for each stage."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.accuracy.tables import markdown
from benchmarks.on_gpu.processes import ROOT
from benchmarks.on_gpu.rows import Row
from benchmarks.on_gpu.stages import STAGES, Stage

_TAIL = 12  # lines of the output of what went wrong


@dataclass
class Outcome:
    """What came of a stage.

    skipped: why it was left out, by intention.
    failures: what went wrong, and what was printed then.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0


def page(facts: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """Return the page, of stages that are not done yet as well."""
    lines = ["# On one GPU", "", "Made by `python -m benchmarks.on_gpu`.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for number, stage in enumerate(STAGES, 1):
        lines += ["", f"## {number}. {stage.title}", "", *_section(stage, outcomes.get(stage.name))]
    return "\n".join(lines) + "\n"


def libraries() -> dict[str, str]:
    """Return the versions of what torch works with on a GPU, of those that there are."""
    found = {"CUDA": torch.version.cuda, "Triton": version("triton") if find_spec("triton") else None}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {name: told for name, told in found.items() if told is not None}


def _section(stage: Stage, outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return ["Not run yet."]
    if outcome.skipped:
        return [f"Left out: {outcome.skipped}."]
    lines = [stage.about]
    if outcome.rows:
        lines += ["", table(outcome.rows)]
    for note in outcome.notes:
        lines += ["", note]
    for wrong, printed in outcome.failures:
        lines += ["", f"**Failed**: {portable(wrong)}"]
        if printed.strip():
            lines += ["", "```text", *portable(printed).rstrip().splitlines()[-_TAIL:], "```"]
    return [*lines, "", f"Took {outcome.seconds:.0f} s."]


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table with a column for each of their names, in the order in which they come up."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return markdown(names, [[_cell(row.get(name)) for name in names] for row in rows])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return portable(str(value)).replace("|", "\\|")


def portable(text: str) -> str:
    """Return text without the folders of this machine."""
    return text.replace(f"{ROOT}/", "").replace(sys.prefix, "python").replace(sys.base_prefix, "python")


def commit() -> str:
    """Return the commit that this is, or that git does not say."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
