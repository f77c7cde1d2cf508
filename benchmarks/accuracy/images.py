"""What experiments draw from, whole and clean: digits, CIFAR, and text."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy import text
from benchmarks.accuracy.cifar import read_cifar
from launch.cli import parse
from launch.data import load

TEXTS = {"documentation": (0,), "two registers": (0, 1)}  # and which of text.py's they have
BY_DIFFICULTY = "documentation by difficulty"


@dataclass(frozen=True)
class Images:
    """Training and test images (n, channels, height, width), labels, and other label sets by name.

    Of text, images are windows (n, letters), labels the letters that follow each, the same shape.
    groups, test_groups: what ranks may have some of only, (n,): the class; of a text the register,
    or whether a window is among the hardest quarter.
    """

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    groups: Tensor
    test_groups: Tensor
    human: dict[str, Tensor] = field(default_factory=dict)


@cache
def read_images(data: str, folder: Path | None) -> Images:
    """Return `"digits"`, a text, or one of `cifar.CIFARS`; folder: of what does not come with a package."""
    if data == "digits":
        source = load(parse(["--data", "digits"]))
        train, test = (part.read(range(len(part))) for part in (source.train, source.test))
        labels, test_labels = source.train.labels, source.test.labels
        return Images(train, labels, test, test_labels, source.classes, labels, test_labels)
    if data == BY_DIFFICULTY:
        windows = text.windows(0)
        return _text(windows, text.hardest_quarter(windows).long())
    if data in TEXTS:
        registers = TEXTS[data]
        windows = torch.cat([text.windows(register) for register in registers])
        return _text(windows, torch.tensor(registers).repeat_interleave(text.TRAIN + text.TEST))
    if folder is None:
        raise ValueError(f"--data-dir must be given for {data}, found nothing")
    (train, labels), (test, test_labels), classes, human = read_cifar(data, folder)
    return Images(train, labels, test, test_labels, classes, labels, test_labels, human)


def _text(windows: Tensor, groups: Tensor) -> Images:
    """Return windows of text, of which each letter is to be told the next."""
    every = text.TRAIN // text.TEST + 1  # test windows are spread evenly, so that they are of the same modules
    tests = torch.arange(len(windows)) % (text.TRAIN + text.TEST) % every == 0
    train, test, letters = windows[~tests], windows[tests], len(text.LETTERS)
    return Images(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], letters, groups[~tests], groups[tests])
