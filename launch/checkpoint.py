"""A job on disk: written by rank 0, with the one before it kept, and handed to the others by rank 0."""

import hashlib
import io
import os
import pickle
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from launch.errors import SettingsError
from launch.folder import write_whole
from launch.messages import from_first
from launch.ranks import Here, together
from launch.records import Record
from launch.settings import Plan, differences

_DIGEST = hashlib.sha256
_RULE = "--out must hold a checkpoint of launch.train"
_VERSION = 1  # of what `save` writes


@dataclass(frozen=True)
class Progress:
    """Where a job is. `run` counts the runs before this one, `step` the steps made in it."""

    run: int
    step: int
    trainer: dict[str, Any] | None
    records: list[Record]


START = Progress(run=0, step=0, trainer=None, records=[])


def save(plan: Plan, progress: Progress) -> None:
    """Write the checkpoint, with its digest behind it, and keep the one before."""
    content = {
        "version": _VERSION,
        "settings": plan.as_plain(),
        "run": progress.run,
        "step": progress.step,
        "trainer": progress.trainer,
        "records": [asdict(record) for record in progress.records],
    }
    file = io.BytesIO()
    torch.save(content, file)
    newest, previous = checkpoint_paths(plan.out)
    write_whole(newest, file.getvalue() + _DIGEST(file.getbuffer()).digest(), previous)


def restore(plan: Plan, here: Here) -> Progress:
    """Return the saved job on every rank, or `START` if rank 0 finds none.

    Rank 0 alone reads, so the folder need not be shared between nodes, as long as rank 0 stays where it was.
    """
    content = from_first(together(lambda: _read(plan) if here.first else None))
    if content is None:
        return START
    records = [Record(**record) for record in content["records"]]
    return Progress(content["run"], content["step"], content["trainer"], records)


def _read(plan: Plan) -> dict[str, Any] | None:
    """Return the newest whole checkpoint, or None if there is none at all."""
    newest, previous = checkpoint_paths(plan.out)
    found = [path for path in (newest, previous) if path.exists()]
    if not found:
        if plan.resume:
            print(f"launch.train: no checkpoint in {plan.out}: a new job", file=sys.stderr, flush=True)
        return None
    if not plan.resume:
        raise SettingsError(f"--out must be a new folder, or be given with --resume; found a job in {plan.out}")
    whole = next((path for path in found if _is_whole(path)), None)
    if whole is None:
        raise SettingsError(f"{_RULE}, found {' and '.join(map(str, found))} damaged or of another kind")
    if whole != found[0]:
        # Out of the way, or the next save would keep it as the one before.
        os.replace(newest, newest.with_suffix(".damaged"))
        print(f"launch.train: {newest} is damaged; using {previous}", file=sys.stderr, flush=True)
    return _loaded(whole, plan)


def _is_whole(path: Path) -> bool:
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return False
    end = max(0, len(content) - _DIGEST().digest_size)
    return _DIGEST(content[:end]).digest() == content[end:]


def _loaded(path: Path, plan: Plan) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version, changed = content["version"], differences(content["settings"], plan, content.get("run", 0))
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise SettingsError(f"{_RULE}, found {path} ({type(error).__name__})") from error
    if version != _VERSION:
        raise SettingsError(f"{_RULE} in version {_VERSION}, found {path} in version {version}")
    if changed:
        rule = f"--resume must keep the settings of {path}, found others: {', '.join(changed)}"
        more = any(each.startswith(("--steps", "--epochs")) for each in changed)
        raise SettingsError(rule + ("; steps can be added in a job's first run, with --schedule none" if more else ""))
    return content


def checkpoint_paths(out: Path) -> tuple[Path, Path]:
    """Return where the newest checkpoint is, and the one before."""
    return out / "checkpoint.pt", out / "checkpoint.previous.pt"
