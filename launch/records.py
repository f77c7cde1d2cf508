"""What is measured at each evaluation, and what follows from it for a whole run."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Record:
    """One evaluation, and means over the steps since the one before it. Shares are in [0, 1].

    Attributes:
        accuracy: percent of clean test examples named right.
        loss: mean training loss over all ranks, on the labels they train on.
        skipped: share of steps in which nothing agreed.
        kept: for each rank, the share of steps in which its gradient was kept.
        cosine: mean cosine between two ranks' gradients; None where it was not measured.
    """

    method: str
    seed: int
    step: int
    accuracy: float
    loss: float
    lr: float
    skipped: float
    kept: list[float]
    cosine: float | None

    def as_json(self) -> str:
        """Return one line of `metrics.jsonl`. JSON knows no NaN: null stands for it."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return json.dumps(plain, allow_nan=False)


@dataclass(frozen=True)
class Result:
    """One run, from its records.

    Attributes:
        final: mean accuracy of the last three evaluations, in percent.
        best: accuracy of the best evaluation, in percent.
        skipped: share of all steps.
        kept: for each rank, share of all steps.
    """

    method: str
    seed: int
    final: float
    best: float
    skipped: float
    kept: list[float]


def result(records: Sequence[Record]) -> Result:
    """Sum up one run's records, which are in the order of their steps."""
    lengths = [later.step - earlier for later, earlier in zip(records, [0, *(r.step for r in records)], strict=False)]
    ranks = min(len(record.kept) for record in records)  # the least, if the job was resumed with other ranks
    return Result(
        method=records[0].method,
        seed=records[0].seed,
        final=fmean(record.accuracy for record in records[-3:]),
        best=max(record.accuracy for record in records),
        skipped=fmean([record.skipped for record in records], lengths),
        kept=[fmean([record.kept[rank] for record in records], lengths) for rank in range(ranks)],
    )


def results(records: Iterable[Record]) -> dict[str, list[Result]]:
    """Sum up every run: for each method, one result per seed, in the order they were trained."""
    runs: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        runs.setdefault((record.method, record.seed), []).append(record)
    by_method: dict[str, list[Result]] = {}
    for (method, _), run in runs.items():
        by_method.setdefault(method, []).append(result(run))
    return by_method


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
