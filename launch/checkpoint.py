"""A job on disk: written whole or not at all, read by rank 0 and handed to the others."""

import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from launch.errors import SettingsError
from launch.ranks import Here, from_first, together
from launch.records import Record
from launch.settings import Plan, differences


@dataclass(frozen=True)
class Progress:
    """Where a job is. `run` counts the runs before this one, `step` the steps made in it."""

    run: int
    step: int
    trainer: dict[str, Any] | None
    records: list[Record]


START = Progress(run=0, step=0, trainer=None, records=[])


def save(plan: Plan, progress: Progress) -> None:
    """Write the checkpoint beside its place, then move it there: a job killed meanwhile keeps the one before."""
    content = {
        "settings": plan.as_plain(),
        "run": progress.run,
        "step": progress.step,
        "trainer": progress.trainer,
        "records": [asdict(record) for record in progress.records],
    }
    path = checkpoint_path(plan.out)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def restore(plan: Plan, here: Here) -> Progress:
    """The saved job on every rank, or `START` if rank 0 finds none (or was not asked to look).

    Rank 0 alone reads, so the folder need not be shared between nodes, as long as rank 0 stays where it was.
    """
    content = from_first(together(lambda: _read(plan) if here.first and plan.resume else None))
    if content is None:
        return START
    records = [Record(**record) for record in content["records"]]
    return Progress(content["run"], content["step"], content["trainer"], records)


def _read(plan: Plan) -> dict[str, Any] | None:
    path = checkpoint_path(plan.out)
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        changed = differences(content["settings"], plan)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise SettingsError(f"--out must hold a checkpoint of launch.train, found {path} ({error})") from error
    if changed:
        raise SettingsError(f"--resume must keep the settings of {path}, found others: {', '.join(changed)}")
    return content


def checkpoint_path(out: Path) -> Path:
    """Where the folder's one checkpoint is."""
    return out / "checkpoint.pt"
