"""A batch is a function of seed, rank and step alone."""

import multiprocessing
import os
import signal
from typing import cast

import pytest
import torch
from torch import Tensor

from launch.batches import RandomBatches, augment, batches, source
from launch.data import Split


def _split() -> Split:
    images = torch.arange(50.0).view(50, 1, 1, 1)
    return Split(lambda indices: images[torch.as_tensor(indices)], torch.arange(50))


def _drawn(seed: int = 0, rank: int = 0, start: int = 0, stop: int = 5) -> list[list[int]]:
    return list(RandomBatches(50, 8, seed, rank, start, stop))


def test_starting_late_gives_the_same_batches() -> None:
    assert _drawn(start=3) == _drawn()[3:]


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 1}, {"start": 5, "stop": 10}])
def test_other_seeds_ranks_and_steps_draw_otherwise(other: dict[str, int]) -> None:
    assert all(a != b for a, b in zip(_drawn(), _drawn(**other), strict=True))


def test_every_example_is_drawn_alike() -> None:
    counts = torch.bincount(torch.tensor(_drawn(stop=1000)).flatten(), minlength=50)
    assert (counts - 160).abs().max() < 65  # five standard deviations


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_reads_images_with_their_labels_in_order(workers: int) -> None:
    indices = _drawn()
    read = list(batches(_split(), RandomBatches(50, 8, 0, 0, 0, 5), workers))
    assert [labels.tolist() for _, labels in read] == indices
    assert [images.flatten().int().tolist() for images, _ in read] == indices


def test_loader_goes_on_when_its_workers_are_sent_sigterm() -> None:
    """A cluster sends it to all processes; the rank needs batches to finish its step."""
    indices = _drawn(stop=8)
    loader = batches(_split(), RandomBatches(50, 8, 0, 0, 0, 8), workers=1)
    read = [next(loader)]
    for worker in multiprocessing.active_children():
        os.kill(cast(int, worker.pid), signal.SIGTERM)
    read += loader
    assert [labels.tolist() for _, labels in read] == indices


def test_loader_leaves_the_generator_of_the_models_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(batches(_split(), [[0, 1]]))
    assert torch.equal(torch.rand(1), expected)


def _pictures() -> Tensor:
    return 1 + torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_augment_is_a_flip_and_a_shift() -> None:
    """Each result is one of the 2 x 5 x 5 crops of the padded image that the docstring promises."""
    images, results = _pictures(), augment(_pictures(), source(1))
    for image, result in zip(images, results, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        crops = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        mirrored = torch.nn.functional.pad(image.flip(-1), (2, 2, 2, 2))
        crops += [mirrored[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert sum(torch.equal(result, crop) for crop in crops) == 1


def test_augment_follows_its_generator() -> None:
    first, again, other = (augment(_pictures(), source(key)) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
