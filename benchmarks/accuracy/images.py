"""What experiments draw from, whole and clean: digits, a small CIFAR-10, and text."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import text
from launch.cli import parse
from launch.data import CIFAR_MEAN, CIFAR_STD, load

TEXTS = {"documentation": (0,), "two registers": (0, 1)}  # and which of text.py's they have
BY_DIFFICULTY = "documentation by difficulty"
SMALL_TRAIN, SMALL_TEST, SMALL_SIDE = 250, 100, 16  # images per class, and their side


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
    """Return `"digits"`, `"small cifar10"` or a text; folder: of what does not come with a package."""
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
    return _small_cifar(folder)


def _small_cifar(folder: Path) -> Images:
    """Return the first images of each class, at half their side, with CIFAR-10N's labels.

    Expects `train/<class>/*.jpg` and `test/<class>/*.jpg`, and human_labels.csv: path, clean label, one column for
    each label set.
    """
    table = folder / "human_labels.csv"
    if not table.is_file():
        raise ValueError(f"--data-dir must hold train/, test/ and human_labels.csv, found {folder}")
    header, *rows = (line.split(",") for line in table.read_text().splitlines())
    by_path = {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    train, names, labels = _first_of_each(folder, "train", SMALL_TRAIN)
    test, _, test_labels = _first_of_each(folder, "test", SMALL_TEST)
    columns = {column: torch.tensor([by_path[name][i] for name in names]) for i, column in enumerate(header[1:])}
    if not torch.equal(columns["clean"], labels):
        raise ValueError("human_labels.csv must have the folders' labels as its clean column, found others")
    return Images(train, labels, test, test_labels, 10, labels, test_labels, columns)


def _text(windows: Tensor, groups: Tensor) -> Images:
    """Return windows of text, of which each letter is to be told the next."""
    every = text.TRAIN // text.TEST + 1  # test windows are spread evenly, so that they are of the same modules
    tests = torch.arange(len(windows)) % (text.TRAIN + text.TEST) % every == 0
    train, test, letters = windows[~tests], windows[tests], len(text.LETTERS)
    return Images(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], letters, groups[~tests], groups[tests])


def _first_of_each(folder: Path, part: str, count: int) -> tuple[Tensor, list[str], Tensor]:
    from torchvision.io import decode_image

    images, names, labels = [], [], []
    for label, kind in enumerate(sorted((folder / part).iterdir())):
        for path in sorted(kind.iterdir())[:count]:
            image = decode_image(str(path)).float() / 255
            images.append(functional.adaptive_avg_pool2d(image, SMALL_SIDE))
            names.append(path.relative_to(folder).as_posix())
            labels.append(label)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return (torch.stack(images) - mean) / std, names, torch.tensor(labels)
