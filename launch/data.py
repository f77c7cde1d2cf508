"""Data sets as splits that are read by index: digits, CIFAR, folders of images, and a made-up one.

Only CIFAR can be downloaded, and only when asked. Digits ship with scikit-learn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from launch.errors import SettingsError
from launch.settings import Settings

DIGITS_TRAIN = 1297  # of 1797; the other 500 are the test set
FAKE_TRAIN, FAKE_TEST, FAKE_CLASSES = 4096, 1024, 10
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Split(Dataset[tuple[Tensor, Tensor]]):
    """Half of a data set. `read` turns indices into images (len, channels, height, width) for the network."""

    read: Callable[[Sequence[int]], Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read([index])[0], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch at once: what a DataLoader asks for where it finds this method."""
        return self.read(indices), self.labels[torch.as_tensor(indices)]

    def relabelled(self, labels: Tensor) -> "Split":
        """Return the same images with other labels."""
        return replace(self, labels=labels)


@dataclass(frozen=True)
class Data:
    """A training and a test split of the same classes."""

    train: Split
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of every image."""
        channels, height, width = self.train.read([0]).shape[1:]
        return channels, height, width


def load(settings: Settings) -> Data:
    """Return the data set that the settings name; `SettingsError` if it is not where they say."""
    return DATASETS[settings.data](settings)


def download(settings: Settings) -> None:
    """Fetch the data set if the settings ask for that. To be called by one process per folder."""
    if settings.download and settings.data.startswith("cifar"):
        _torchvision_cifar(settings, train=True, download=True)


def _digits(settings: Settings) -> Data:
    """Return scikit-learn's 1797 digits of 8x8 pixels in [0, 1], always shuffled the same way."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)[order]
    train, test = slice(None, DIGITS_TRAIN), slice(DIGITS_TRAIN, None)
    return Data(_in_memory(images[train], labels[train]), _in_memory(images[test], labels[test]), 10)


def _fake(settings: Settings) -> Data:
    """Return one random picture per class, plus noise three times as strong: learnable, and of any size."""
    source = torch.Generator().manual_seed(0)
    side = settings.image_size
    prototypes = torch.randn(FAKE_CLASSES, 3, side, side, generator=source)

    def split(count: int, seed: int) -> Split:
        labels = torch.randint(FAKE_CLASSES, (count,), generator=source)

        def read(indices: Sequence[int]) -> Tensor:
            noises = [
                torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed + index)) for index in indices
            ]
            return prototypes[labels[torch.as_tensor(indices)]] + 3 * torch.stack(noises)

        return Split(read, labels)

    return Data(split(FAKE_TRAIN, 1), split(FAKE_TEST, 1 + FAKE_TRAIN), FAKE_CLASSES)


def _cifar(settings: Settings) -> Data:
    """Return CIFAR-10 or CIFAR-100, kept in memory as bytes."""

    def split(train: bool) -> Split:
        source = _torchvision_cifar(settings, train=train)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2)
        return _in_memory(images, torch.tensor(source.targets), CIFAR_MEAN, CIFAR_STD)

    return Data(split(True), split(False), 10 if settings.data == "cifar10" else 100)


def _torchvision_cifar(settings: Settings, train: bool, download: bool = False) -> Any:
    from torchvision import datasets

    kind = datasets.CIFAR10 if settings.data == "cifar10" else datasets.CIFAR100
    try:
        return kind(str(settings.data_dir), train=train, download=download)
    except (RuntimeError, OSError) as error:
        problem = f"--data-dir must hold {settings.data}, or be given with --download; found {settings.data_dir}"
        raise SettingsError(f"{problem} ({error})") from error


def _imagefolder(settings: Settings) -> Data:
    """Return a folder of images: one per class under train/ and test/ (or val/), all cropped to a square."""
    from torchvision import datasets, transforms

    side = settings.image_size
    shrink = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()])
    root = settings.data_dir
    test_root = root / "test" if (root / "test").is_dir() else root / "val"
    train, test = (_image_folder(datasets.ImageFolder, folder, shrink) for folder in (root / "train", test_root))
    if train.classes != test.classes:
        rule = "--data-dir must hold the same classes for training and test"
        raise SettingsError(f"{rule}; found {train.classes} and {test.classes}")
    return Data(_decoded(train), _decoded(test), len(train.classes))


def _image_folder(kind: Callable[..., Any], folder: Path, transform: object) -> Any:
    try:
        return kind(str(folder), transform=transform)
    except FileNotFoundError as error:
        problem = "--data-dir must hold train/ and test/ (or val/) with a folder of images per class"
        raise SettingsError(f"{problem}; found {folder} ({error})") from error


def _decoded(source: Any) -> Split:
    def read(indices: Sequence[int]) -> Tensor:
        return _normalised(torch.stack([source[index][0] for index in indices]), IMAGENET_MEAN, IMAGENET_STD)

    return Split(read, torch.tensor(source.targets))


def _in_memory(images: Tensor, labels: Tensor, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> Split:
    def read(indices: Sequence[int]) -> Tensor:
        return _normalised(images[torch.as_tensor(indices)], mean, std)

    return Split(read, labels)


def _normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return (unit - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


DATASETS: dict[str, Callable[[Settings], Data]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagefolder": _imagefolder,
    "fake": _fake,
}
