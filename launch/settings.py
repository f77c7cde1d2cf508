"""What one training job is: every choice a user can make, and the checks that need the other choices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from launch.errors import SettingsError

# A job stopped and resumed may change these: they have no part in the numbers it computes.
FREE_TO_CHANGE = ("data_dir", "download", "workers", "device", "out", "resume", "checkpoint_every", "world",
                  "check_every", "audit_every")  # fmt: skip
# So may a job that is to be longer than it was.
FREE_FOR_MORE_STEPS = ("steps", "epochs", "eval_every")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One job. The command line in `launch/cli.py` explains each field and holds its default."""

    data: str
    data_dir: Path
    download: bool
    image_size: int
    augment: bool
    label_noise: float
    corrupt_ranks: tuple[int, ...] | None
    model: str | None

    methods: tuple[str, ...]
    tau: float
    scope: Literal["model", "bucket"] | None
    exchange: Literal["auto", "sharded", "gather"]
    wire_dtype: str | None
    max_norm_ratio: float | None
    start_step: int

    steps: int | None
    epochs: float | None
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    amp: str
    seed: int
    seeds: int

    eval_every: int | None
    checkpoint_every: int | None
    check_every: int | None
    audit_every: int | None
    out: Path | None
    resume: bool
    device: str
    workers: int

    @property
    def runs(self) -> list[tuple[int, str]]:
        """Return every (seed, method) to train, in order: all methods of one seed before the next seed."""
        return [(seed, method) for seed in range(self.seed, self.seed + self.seeds) for method in self.methods]

    def as_plain(self) -> dict[str, object]:
        """Return the settings as JSON can hold them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """Settings with nothing left open: the number of ranks and the size of the data are known."""

    world: int
    corrupt_ranks: tuple[int, ...]
    model: str
    steps: int
    eval_every: int
    checkpoint_every: int
    out: Path


def plan(settings: Settings, world: int, train_size: int, out: Path) -> Plan:
    """Fill in what depends on the other choices; `SettingsError` where two of them contradict."""
    steps = _steps(settings, world, train_size)
    eval_every = settings.eval_every or max(1, steps // 20)
    open_choices: dict[str, object] = {
        "corrupt_ranks": _corrupt_ranks(settings, world),
        "model": settings.model or ("mlp" if settings.data == "digits" else "resnet18"),
        "steps": steps,
        "eval_every": eval_every,
        "checkpoint_every": settings.checkpoint_every or 5 * eval_every,
        "out": out,
    }
    return Plan(world=world, **{**vars(settings), **open_choices})


def _steps(settings: Settings, world: int, train_size: int) -> int:
    if settings.epochs is None:
        return settings.steps or 400
    return max(1, math.ceil(settings.epochs * train_size / (settings.batch_size * world)))


def _corrupt_ranks(settings: Settings, world: int) -> tuple[int, ...]:
    """Return what was asked for, or rank 1 for the demonstration, where a majority stays honest."""
    if settings.corrupt_ranks is None:
        return (1,) if settings.data == "digits" and world >= 3 else ()
    for rank in settings.corrupt_ranks:
        if not 0 <= rank < world:
            raise SettingsError(f"--corrupt-ranks must be ranks in [0, {world - 1}], found {rank}")
    return tuple(sorted(set(settings.corrupt_ranks)))


def differences(saved: Mapping[str, object], now: Plan, run: int = 0) -> list[str]:
    """Return which settings keep `now` from going on where a job with the `saved` ones stopped, in that run."""
    before, after = as_flags(saved), as_flags(now.as_plain())
    more = FREE_FOR_MORE_STEPS if can_grow(saved, now, run) else ()
    free = as_flags(dict.fromkeys([*FREE_TO_CHANGE, *more]))
    return [
        f"{flag} (was {before.get(flag)}, now {value})"
        for flag, value in after.items()
        if flag not in free and before.get(flag) != value
    ]


def can_grow(saved: Mapping[str, object], now: Plan, run: int) -> bool:
    """Return whether a saved job can go on to more steps, to the numbers it would have had with them at once.

    Runs before the saved one have ended for good, and a schedule that ends with the steps has used them up.
    """
    before = saved.get("steps")
    return isinstance(before, int) and now.steps > before and run == 0 and now.schedule == "none"


def as_flags(plain: Mapping[str, object]) -> dict[str, str]:
    """Return the command line's name for every setting, and its value as text."""
    return {_flag(name): _text(value) for name, value in plain.items()}


def _flag(name: str) -> str:
    return "--method or --compare" if name == "methods" else f"--{name.replace('_', '-')}"


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value)) or "none"
    return "unset" if value is None else str(value)
