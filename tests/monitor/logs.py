"""Logs for tests of what reads them: records as AgreementLog writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def record(step: int, kept: Sequence[float | None], **more: Any) -> dict[str, Any]:
    """Return a record; `more` are columns of the ranks, or the record's own."""
    columns: dict[str, list[Any]] = {
        "kept": list(kept),
        "host": [f"node-{rank // 2}" for rank in range(len(kept))],
        "distance": [1.0] * len(kept),
        **{name: [0.0] * len(kept) for name in ("trend", "nonfinite", "overlong", "zero", "flipped")},
        "out_since": [None] * len(kept),
        **{name: value for name, value in more.items() if isinstance(value, list)},
    }
    ranks = [{"rank": rank, **{name: column[rank] for name, column in columns.items()}} for rank in range(len(kept))]
    own = {name: value for name, value in more.items() if not isinstance(value, list)}
    return {"gaf_ddp_log": 1, "time": 0.0, "step": step, "decisions": 100, "ratio": 3.0, "ranks": ranks,
            "max_norm_ratio": 10.0, "gaf/skipped_fraction": 0.0, "cosine": None} | own  # fmt: skip


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def job(until: int = 500) -> list[dict[str, Any]]:
    """Return a log in which rank 2 is not finite from 100 to 200 and rank 1 is far from 300 on."""
    return [
        record(
            step,
            [1.0, 0.0 if step > 300 else 1.0, 0.1 if step == 200 else 1.0, 0.97],
            distance=[1.0, 0.02 * step if step > 300 else 1.0, 1.0, 1.1],
            trend=[0.0, 2.0 if step > 300 else 0.0, 0.0, 0.0],
            nonfinite=[0.0, 0.0, 0.9 if step == 200 else 0.0, 0.0],
        )
        for step in range(100, until + 1, 100)
    ]
