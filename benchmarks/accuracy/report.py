"""Writing what a group showed: accuracy_<group>.md with tables, and accuracy_<group>.png."""

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.plots import draw
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.summary import engines_apart, seconds_of
from benchmarks.accuracy.tables import LEGEND, group_text


def write(
    group: str, question: str, experiments: Sequence[Experiment], store: Store, out: Path, command: str
) -> None:
    """Write a group's page and picture into `out`; nothing where no experiment has a finished arm."""
    text = group_text(group, experiments, store)
    if not text:
        return
    picture = out / f"accuracy_{group}.png"
    drawn = draw(group, question, experiments, store, picture)
    image = f"![{question}]({picture.name})" if drawn else ""
    parts = [f"# {question}", _made_by(experiments, store, command), image, LEGEND, text]
    (out / f"accuracy_{group}.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _made_by(experiments: Sequence[Experiment], store: Store, command: str) -> str:
    alone, real = (
        sum(seconds_of(e, store, engine) for e in experiments) / 60 for engine in ("one process", "ddp")
    )
    spent = f"The runs took {alone:.0f} minutes in one process each, added up"
    spent += f" and {real:.0f} on real ranks." if real else "."
    if apart := engines_apart(experiments, store):
        spent += f" {len(apart)} runs were made both ways: final accuracies differ by {mean(apart):.2f} points"
        spent += f" on average, {max(apart):.2f} at most."
    return f"`{command}` on {machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. {spent}"


def machine() -> str:
    """The processor, how many of it, and the GPU if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} x {name}{gpu}"
