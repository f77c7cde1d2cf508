"""Wrong labels: on some ranks, and at random."""

import pytest
import torch

from launch.labels import add_label_noise, shift_labels

LABELS = torch.arange(1000) % 10


def test_shift_is_a_bijection_without_a_fixed_class() -> None:
    shifted = shift_labels(torch.arange(10), 10)
    assert sorted(shifted.tolist()) == list(range(10))
    assert (shifted != torch.arange(10)).all()


def test_shift_takes_the_next_class() -> None:
    assert shift_labels(torch.tensor([0, 3, 9]), 10).tolist() == [1, 4, 0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_noise_changes_exactly_its_share(share: float) -> None:
    noisy = add_label_noise(LABELS, 10, share, seed=3)
    assert (noisy != LABELS).sum() == round(share * len(LABELS))
    assert ((noisy >= 0) & (noisy < 10)).all()


def test_noise_leaves_its_input_alone() -> None:
    before = LABELS.clone()
    add_label_noise(LABELS, 10, 0.5, seed=0)
    assert torch.equal(LABELS, before)


def test_noise_is_the_same_for_the_same_seed_only() -> None:
    first, again, other = (add_label_noise(LABELS, 10, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_reaches_every_other_class_alike() -> None:
    zeros = torch.zeros(9000, dtype=torch.int64)
    counts = torch.bincount(add_label_noise(zeros, 10, 1.0, seed=0), minlength=10)
    assert counts[0] == 0
    assert (counts[1:] - 1000).abs().max() < 150  # five standard deviations of a binomial count


def test_noise_with_two_classes_flips() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    assert add_label_noise(labels, 2, 1.0, seed=0).tolist() == [1, 0, 0, 1]
