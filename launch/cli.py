"""The command line: every option with its help, its default and the rule its value must keep."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn

from launch.data import DATASETS
from launch.errors import SettingsError
from launch.methods import METHODS
from launch.models import MODELS
from launch.settings import Settings

DESCRIPTION = """\
Train a classifier under DistributedDataParallel, with and without Gradient Agreement Filtering.
Without arguments: scikit-learn's digits, one rank with wrong labels, averaging against the filters."""

BASELINE_AND_FILTERS = ("average", "tau", "consensus")
EPILOG = """\
All flags must be the same on every rank. Exit codes: 0 all is done; 2 a setting, a file or a disk must be mended,
as the last line says; 143 SIGTERM came, the job is saved and goes on with --resume; 1 anything else.

example: torchrun --standalone --nproc-per-node 4 -m launch.train --seeds 3"""


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the command line's settings; `SettingsError` names the option, its rule and the value found."""
    values = vars(_parser().parse_args(arguments))
    compare, method = values.pop("compare"), values.pop("method")
    values["methods"] = (method,) if method else compare or BASELINE_AND_FILTERS
    settings = Settings(**values)
    if settings.resume and settings.out is None:
        raise SettingsError("--resume needs --out, the folder of the job to go on with; found none")
    return settings


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and prints help once: torchrun starts one of these on every rank."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


class _Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and the description as it is written."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch.train", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Format, allow_abbrev=False
    )
    _add_data(parser.add_argument_group("data"))
    _add_filter(parser.add_argument_group("method and filter"))
    _add_training(parser.add_argument_group("training"))
    _add_job(parser.add_argument_group("job"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", choices=DATASETS, default="digits", help="'fake' is learnable noise, for speed tests")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR lies, or train/ and test/ (or val/)")
    add("--download", action="store_true", help="fetch CIFAR into --data-dir")
    add("--image-size", type=_number(int, 8), default=64, help="pixels; imagefolder and fake only")
    add("--augment", action="store_true", help="random flips and shifted crops of the training images")
    add("--label-noise", type=_number(float, 0, 1), default=0.0, help="share of labels made wrong, at random")
    add(
        "--corrupt-ranks",
        type=_ranks,
        default=None,
        metavar="RANKS",
        help="ranks with labels shifted by one class, as in 0,3, or none; unset: 1 for digits on 3 or more ranks",
    )
    add("--model", choices=MODELS, default=None, help="unset: mlp for digits, else resnet18")


def _add_filter(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument("--method", choices=METHODS, default=None, help="train with this one alone")
    which.add_argument(
        "--compare",
        type=_methods,
        nargs="?",
        default=None,
        const=BASELINE_AND_FILTERS,
        metavar="METHODS",
        help="train with each of these, from the same seeds; without --method: average,tau,consensus",
    )
    add = group.add_argument
    add(
        "--tau",
        type=_number(float, 0, 2),
        default=0.9,
        help="tau and paper: ranks agree up to this cosine distance",
    )
    add(
        "--scope",
        choices=("model", "bucket"),
        default=None,
        help="tau and paper: one decision per step, or per bucket; unset: model",
    )
    add("--exchange", choices=("auto", "sharded", "gather"), default="auto", help="tau and paper: how gradients travel")
    add("--wire-dtype", choices=("bf16", "fp16"), default=None, help="send gradients in this dtype")
    add(
        "--max-norm-ratio",
        type=_optional(_number(float, 1)),
        default=10.0,
        help="a gradient longer than this many median norms has no vote; or none",
    )
    add("--start-step", type=_number(int, 0), default=0, help="plain averaging before this step")


def _add_training(group: argparse._ArgumentGroup) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_number(int, 1), default=None, help="updates to make; unset: 400")
    length.add_argument("--epochs", type=_number(float, 0.001), default=None, help="or passes over the data")
    add = group.add_argument
    add("--batch-size", type=_number(int, 1), default=20, help="examples per rank and step")
    add("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd", help="sgd is with Nesterov momentum")
    add("--lr", type=_number(float, 0), default=0.05, help="learning rate")
    add("--momentum", type=_number(float, 0, 1), default=0.9, help="for sgd")
    add("--weight-decay", type=_number(float, 0), default=1e-4, help="for every optimizer")
    add("--schedule", choices=("none", "cosine"), default="none", help="of the learning rate")
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast; fp16 needs CUDA")
    add("--seed", type=_number(int, 0), default=0, help="the first seed")
    add("--seeds", type=_number(int, 1), default=3, help="how many seeds to train from")


def _add_job(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval-every", type=_number(int, 1), default=None, help="steps; unset: a 20th of them")
    add("--checkpoint-every", type=_number(int, 1), default=None, help="steps; unset: every 5 evaluations")
    add("--check-every", type=_number(int, 1), default=None, help="steps; compare replicas; unset: never")
    add(
        "--audit-every",
        type=_number(int, 1),
        default=None,
        help="steps; one batch on all ranks; unset: never",
    )
    add("--out", type=Path, default=None, help="folder for all results; unset: runs/DATE-TIME")
    add("--resume", action="store_true", help="go on from --out's checkpoint, if there is one")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if every rank gets a GPU")
    add("--workers", type=_number(int, 0), default=0, help="loader processes per rank")


def _number(kind: Callable[[str], float], low: float, high: float = float("inf")) -> Callable[[str], float]:
    """Parse a number and hold it to [low, high]."""
    rule = f"in [{low}, {high}]" if high < float("inf") else f"at least {low}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or value == float("inf"):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {rule}, found {text!r}")
        return value

    return read


def _optional(read: Callable[[str], float]) -> Callable[[str], float | None]:
    return lambda text: None if text == "none" else read(text)


def _ranks(text: str) -> tuple[int, ...]:
    if text in ("", "none"):
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ranks as in 0,3, or none; found {text!r}") from None


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= set(METHODS):
        rule = f"must be different methods out of {','.join(METHODS)}"
        raise argparse.ArgumentTypeError(f"{rule}; found {text!r}")
    return names
