"""The images and labels experiments draw from, whole and clean: digits, a small CIFAR-10, CIFAR-100."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

SMALL_TRAIN, SMALL_TEST, SMALL_SIDE = 250, 100, 16  # images per class, and their side
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """Training and test images (n, channels, height, width), labels, and other label sets by name."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    human: dict[str, Tensor] = field(default_factory=dict)


@lru_cache(maxsize=2)
def read_images(data: str, folder: Path | None) -> Images:
    """The data set called `data`; folder: where the user keeps those that do not come with a package."""
    if data == "digits":
        return _digits()
    if folder is None:
        raise ValueError(f"--data-dir must be given for {data}, found nothing")
    return _small_cifar(folder) if data == "small cifar10" else _cifar100(folder)


def _digits() -> Images:
    """The 1797 digits of scikit-learn, 8x8 pixels in [0, 1], 500 of them for the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)[order].long()
    return Images(images[:1297], labels[:1297], images[1297:], labels[1297:], 10)


def _small_cifar(folder: Path) -> Images:
    """The first images of each class, at half their side; CIFAR-10N's labels.

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
    return Images(train, labels, test, test_labels, 10, columns)


def _first_of_each(folder: Path, part: str, count: int) -> tuple[Tensor, list[str], Tensor]:
    from torchvision.io import decode_image

    images, names, labels = [], [], []
    for label, kind in enumerate(sorted((folder / part).iterdir())):
        for path in sorted(kind.iterdir())[:count]:
            image = decode_image(str(path)).float() / 255
            images.append(functional.adaptive_avg_pool2d(image, SMALL_SIDE))
            names.append(path.relative_to(folder).as_posix())
            labels.append(label)
    return _normalised(torch.stack(images)), names, torch.tensor(labels)


def _cifar100(folder: Path) -> Images:
    """CIFAR-100 as torchvision downloads it; the labels of CIFAR-100N-Fine if CIFAR-100_human.pt is beside it."""
    from torchvision.datasets import CIFAR100

    parts = [CIFAR100(str(folder), train=train) for train in (True, False)]
    train, test = (_normalised(torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255) for part in parts)
    labels, test_labels = (torch.tensor(part.targets) for part in parts)
    noisy = folder / "CIFAR-100_human.pt"
    stored = torch.load(noisy, weights_only=False) if noisy.is_file() else {}
    human = {"fine": torch.as_tensor(stored["noisy_label"]).long()} if stored else {}
    return Images(train, labels, test, test_labels, 100, human)


def _normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR_STD).view(3, 1, 1)
