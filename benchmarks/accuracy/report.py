"""Writing what a group showed: accuracy_<group>.md with tables, and accuracy_<group>.png."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from benchmarks.accuracy.arms import all_runs
from benchmarks.accuracy.declare import PAST, Experiment
from benchmarks.accuracy.plots import draw
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.summary import tables_of
from benchmarks.accuracy.tables import LEGEND, group_text
from benchmarks.measure import hardware, machine


def write(group: str, question: str, experiments: Sequence[Experiment], store: Store, out: Path, command: str) -> None:
    """Write a group's page and picture into `out`; nothing where no experiment has a finished arm."""
    tables = tables_of(experiments, store)
    if not tables:
        return
    picture = out / f"accuracy_{group}.png"
    draw(group, question, tables, picture)
    made_by = f"`{command}`, written on {machine(hardware(torch.device('cpu')))}. {_spent(experiments, store)}"
    made_by += _past(experiments, store, f"accuracy_{group}.md")
    parts = [f"# {question}", made_by, f"![{question}]({picture.name})", LEGEND, group_text(group, tables)]
    (out / f"accuracy_{group}.md").write_text("\n\n".join(parts) + "\n")


def _past(experiments: Sequence[Experiment], store: Store, page: str) -> str:
    """Return what is said of runs that this code did not make."""
    if not any(run in store for run in all_runs(experiments) if run.rule.is_past):
        return ""
    text = (
        f"\n\nArms *as of {PAST[1:]}* were trained by that commit's code, which judged in the same step. Its own page, "
    )
    return text + f"`git show {PAST[1:]}:benchmarks/results/{page}`, has those of rules that are gone beside them."


def _spent(experiments: Sequence[Experiment], store: Store) -> str:
    """Return how long the runs took, and how far those that were made both ways are apart."""
    runs = [run for run in all_runs(experiments) if run in store]
    minutes = {engine: sum(store[run]["seconds"] for run in runs if run.engine == engine) / 60
               for engine in ("one process", "ddp")}  # fmt: skip
    text = f"The runs took {minutes['one process']:.0f} minutes in one process each, added up"
    text += f" and {minutes['ddp']:.0f} on real ranks." if minutes["ddp"] else "."
    pairs = [(run, replace(run, engine="one process")) for run in runs if run.engine == "ddp"]
    if apart := [abs(store[real]["final"] - store[alone]["final"]) for real, alone in pairs if alone in store]:
        text += f" {len(apart)} runs were made both ways: final accuracies differ by {mean(apart):.2f} points"
        text += f" on average, {max(apart):.2f} at most."
    return text
