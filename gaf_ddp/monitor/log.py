"""AgreementLog: what a GAFState saw, every k-th step, in a file, in TensorBoard, and in whatever takes a dict."""

import math
import time
from typing import Any

import torch
import torch.distributed as dist

from gaf_ddp.given import require_state
from gaf_ddp.monitor.log_targets import FORMAT, KEY, writing
from gaf_ddp.monitor.report import Report
from gaf_ddp.monitor.totals import Sums, between, kept_shares, summary
from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.settings import require
from gaf_ddp.state import GAFState

SHARES = ("nonfinite", "overlong", "zero")  # of a record's decisions
_OF_REPORT = (
    "host",
    "trend",
    "first_out",
    "out_since",
    "longest_out",
    "trusted_since",
    "condemned_since",
)  # what GAFState.report() alone knows


class AgreementLog:
    """Write statistics of a state, each record over the steps since the last one.

        log = AgreementLog(state, "agreement.jsonl", SummaryWriter(), wandb.log, every=100)
        for inputs, targets in loader:
            ...
            optimizer.step()
            log.step()

    The log and `state.summary()` count each for itself: neither resets the other. A restarted job appends to its file.
    Where it repeats steps, `gaf_ddp.report` reads the later records.

    Args:
        state: the hook's state.
        targets: each the path of a file of JSON lines, an object with `add_scalar` and `add_image` as a
            SummaryWriter of TensorBoard has, or a callable that takes a dict of floats, as `wandb.log` does. Names
            are those of `state.summary()`, and `gaf/step`, `gaf/distance_rank_00` (z), `gaf/trend_rank_00` (as
            `state.report()` has it) …
        every: steps between records.
        cosine_every: steps between records with the ranks' cosines `(W, W)`, a picture in TensorBoard.
        rank: the one that writes, in the state's group; None: each that calls `step`.

    Cost: nothing save for records, which wait for the last step's decisions.

    Raises:
        TypeError: state is no GAFState, or a target is nothing of these.
        ValueError: every or cosine_every is no integer >= 1, rank is no integer >= 0, a file's folder is missing,
            or the file is something else than a log.
    """

    def __init__(
        self,
        state: GAFState,
        *targets: Any,
        every: int = 100,
        cosine_every: int = 1000,
        rank: int | None = 0,
    ) -> None:
        require_state(state)
        for name, steps in (("every", every), ("cosine_every", cosine_every)):
            require(type(steps) is int and steps >= 1, f"{name} must be an integer >= 1", steps)
        require(rank is None or (type(rank) is int and rank >= 0), "rank must be an integer >= 0 or None", rank)
        self.state, self.every, self.cosine_every, self.rank = state, every, cosine_every, rank
        self._writers = [writing(target) for target in targets]
        self._before = self._sums()  # the state's, at the last record
        self._began = state._records.statistics.began  # whose sums these are: a checkpoint may be loaded
        self._seen: int | None = None  # the last step that was counted
        self._written = 0
        self._cosine_written: int | None = None

    def step(self) -> None:
        """Write a record if one is due; call it after each step."""
        step = self.state.step
        if step == self._seen or not self._writes():
            return
        if self._seen is None:  # a checkpoint may have been loaded since the log was made
            self._written = step - 1
        self._seen = step
        if step // self.every != self._written // self.every:
            self._written = step
            record = self._record(step)
            if record is not None:
                for write in self._writers:
                    write(record)

    def _writes(self) -> bool:
        if self.rank is None or not dist.is_initialized():
            return True
        return dist.get_rank(self.state.process_group) == self.rank

    def _sums(self) -> Sums:
        self.state._catch_up()
        return self.state._records.statistics.sums()

    def _record(self, step: int) -> dict[str, Any] | None:
        """Return what the steps since the last record say, as JSON can hold it; None if they decided nothing."""
        agreement, everything = self.state.agreement, self._sums()
        began = self.state._records.statistics.began
        if began is not self._began:
            self._before = self._began = began
        sums = between(self._before, everything)
        if agreement is None or not sum(sums["decisions"]):
            return None
        self._before = everything
        now, report = _read(agreement), self.state.report()
        if self._cosine_written is None or step // self.cosine_every != self._cosine_written // self.cosine_every:
            self._cosine_written = step
        return {
            KEY: FORMAT,
            "time": round(time.time(), 3),
            "step": step,
            "decisions": int(sums["decisions"][0]),
            "ratio": self.state._ratio,
            "max_norm_ratio": self.state.max_norm_ratio,
            "watch": self.state.watch,
            "held_out": report.has_held_out,
            **{name: _plain(value) for name, value in summary(sums).items() if "rank" not in name},
            "gaf/noise_scale": _plain(self.state._records.statistics.noise_scale),
            "ranks": self._ranks(sums, now, report),
            "cosine": now["cosine"] if self._cosine_written == step else None,
        }

    def _ranks(self, sums: dict[str, list[float]], now: dict[str, list[Any]], report: Report) -> list[dict[str, Any]]:
        """Return of each rank: shares of the decisions in which it was what their names say, z now, and so on."""
        (decisions,) = sums["decisions"]
        columns = {"kept": [_plain(share) for share in kept_shares(sums)]}  # None of a rank that has finished
        columns |= {name: [_plain(count / decisions) for count in sums[name]] for name in SHARES}
        columns["flipped"], columns["distance"] = now["flipped"], now["distance"]
        columns |= {name: [getattr(rank, name) for rank in report.ranks] for name in _OF_REPORT}
        return [
            {"rank": rank, **dict(zip(columns, values, strict=True))}
            for rank, values in enumerate(zip(*columns.values(), strict=True))
        ]


def _read(agreement: Agreement) -> dict[str, list[Any]]:
    """Return z, flipped and cosines, means over a step's buckets, as numbers or None, at one host sync."""
    size = agreement.kept.shape[-1]
    nothing = torch.full_like(agreement.kept, math.nan, dtype=torch.float64)
    columns = [nothing if each is None else each for each in (agreement.distance, agreement.flipped)]
    table = torch.cat([torch.stack([c.double() for c in columns], -2), agreement.cosine.double()], -2)
    rows = table.reshape(-1, size + 2, size).nanmean(0).tolist()
    distance, flipped, *cosine = [[_plain(value) for value in row] for row in rows]
    return {"distance": distance, "flipped": flipped, "cosine": cosine}


def _plain(value: float) -> float | None:
    """Return the number to six digits, None for what is no number, which JSON cannot hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
