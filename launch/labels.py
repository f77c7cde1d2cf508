"""Two ways to make training labels wrong: on some ranks only, or everywhere at random."""

import torch
from torch import Tensor


def shift_labels(labels: Tensor, classes: int) -> Tensor:
    """Return the next class for every label, the first for the last: wrong, and consistently so."""
    return (labels + 1) % classes


def add_label_noise(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """Make another class, chosen at random, of a share of the labels, chosen at random.

    The same seed gives the same labels, so every rank learns from the same noisy data set.
    """
    source = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=source)[: round(share * len(labels))]
    offsets = torch.randint(1, classes, (len(chosen),), generator=source)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + offsets) % classes
    return noisy
