"""Data sets: sizes, ranges, what is read, and what is said when they are not there."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import parse
from launch.data import Data, load
from launch.errors import SettingsError


def _load(*arguments: object) -> Data:
    return load(parse([str(a) for a in arguments]))


def test_digits_have_the_documented_sizes_and_range() -> None:
    data = _load()
    assert (len(data.train), len(data.test), data.classes, data.shape) == (1297, 500, 10, (1, 8, 8))
    images = data.train.read(range(len(data.train)))
    assert images.min() == 0
    assert images.max() == 1


def test_digits_are_split_the_same_way_each_time_and_share_nothing() -> None:
    first, again = _load(), _load()
    assert torch.equal(first.train.labels, again.train.labels)
    train = {image.numpy().tobytes() for image in first.train.read(range(1297))}
    test = {image.numpy().tobytes() for image in first.test.read(range(500))}
    assert not train & test


def test_digits_hold_every_class_in_both_halves() -> None:
    data = _load()
    assert torch.bincount(data.train.labels).min() > 100
    assert torch.bincount(data.test.labels).min() > 30


def test_split_reads_single_examples_and_batches_alike() -> None:
    train = _load().train
    images, labels = train.__getitems__([3, 5])
    image, label = train[5]
    assert torch.equal(images[1], image)
    assert labels[1] == label


def test_fake_data_is_of_the_asked_size_and_repeatable() -> None:
    data = _load("--data", "fake", "--image-size", 16)
    assert data.shape == (3, 16, 16)
    assert torch.equal(data.train.read([7]), data.train.read([6, 7])[1:])
    assert not torch.equal(data.train.read([7]), data.test.read([7]))


def test_fake_data_can_be_learned() -> None:
    """The nearest class mean of the training half names most of the test half."""
    data = _load("--data", "fake", "--image-size", 8)
    images, labels = data.train.__getitems__(range(1000))
    means = torch.stack([images[labels == c].mean(0) for c in range(10)]).flatten(1)
    tests, answers = data.test.__getitems__(range(200))
    assert (torch.cdist(tests.flatten(1), means).argmin(1) == answers).float().mean() > 0.8


def _write_images(root: Path, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for count in range(3):
            Image.new("RGB", (20, 12), (200 * number, 50, 50)).save(root / name / f"{count}.png")


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_folders_of_images(tmp_path: Path, test_folder: str) -> None:
    for half in ("train", test_folder):
        _write_images(tmp_path / half)
    data = _load("--data", "imagefolder", "--data-dir", tmp_path, "--image-size", 8)
    assert (data.shape, data.classes) == ((3, 8, 8), 2)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    reds = data.test.read(range(6))[:, 0].mean((1, 2))
    assert torch.allclose(reds[:3], torch.tensor((0 - 0.485) / 0.229))
    assert torch.allclose(reds[3:], torch.tensor((200 / 255 - 0.485) / 0.229))


def test_folders_with_other_classes_for_the_test_are_refused(tmp_path: Path) -> None:
    _write_images(tmp_path / "train")
    _write_images(tmp_path / "test", ("cat", "cow"))
    with pytest.raises(SettingsError, match=r"--data-dir must hold the same classes.*'dog'.*'cow'"):
        _load("--data", "imagefolder", "--data-dir", tmp_path)


@pytest.mark.parametrize("name", ["imagefolder", "cifar10", "cifar100"])
def test_missing_data_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"--data-dir must hold .*; found {tmp_path}"):
        _load("--data", name, "--data-dir", tmp_path)


def test_cifar_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    content: dict[str, Any] = {"data": pixels, "labels": [4, 9]}
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps(content))
    data = _load("--data", "cifar10", "--data-dir", tmp_path)
    assert (len(data.train), len(data.test), data.shape) == (10, 2, (3, 32, 32))
    assert data.test.labels.tolist() == [4, 9]
    first_red = data.test.read([0])[0, 0, 0, :3]
    assert torch.allclose(first_red, (torch.tensor([0.0, 1, 2]) / 255 - 0.4914) / 0.2470)
