"""Which examples a rank sees at which step: a pure function of (seed, rank, step), so that a job can resume."""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler

from launch.data import Split


def source(*key: int) -> torch.Generator:
    """Return a random generator of its own for every key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class RandomBatches(Sampler[list[int]]):
    """Indices for the steps in [start, stop): drawn with replacement from the whole training set on every rank."""

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, start: int, stop: int) -> None:
        self._size, self._batch_size = size, batch_size
        self._key, self._steps = (seed, rank), range(start, stop)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield one list of indices per step."""
        for step in self._steps:
            drawn = torch.randint(self._size, (self._batch_size,), generator=source(*self._key, step))
            yield drawn.tolist()

    def __len__(self) -> int:
        return len(self._steps)


def batches(
    split: Split, indices: Sampler[list[int]] | Sequence[list[int]], workers: int = 0, pinned: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return images and labels for each list of indices, read by `workers` processes (0: by this one).

    Batches on their way to a GPU travel faster from `pinned` memory.
    """
    loader = DataLoader(
        split,
        batch_sampler=indices,
        collate_fn=_as_read,
        num_workers=workers,
        pin_memory=pinned,
        # Else every loader draws from the generator that initialises models.
        generator=torch.Generator(),
        worker_init_fn=_outlive_sigterm,
    )
    return iter(loader)


def _as_read(batch: Any) -> Any:
    return batch


def _outlive_sigterm(worker: int) -> None:
    """Let a rank that is sent SIGTERM with all its workers finish its step; they end when it does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Flip half of the images, and move each by up to an eighth of its side, with zeros coming in."""
    count, channels, height, width = images.shape
    flipped = torch.rand(count, 1, 1, 1, generator=random) < 0.5
    images = torch.where(flipped, images.flip(-1), images)
    margin = height // 8
    padded = functional.pad(images, (margin,) * 4)
    top, left = torch.randint(2 * margin + 1, (2, count, 1), generator=random)
    rows = (top + torch.arange(height)).view(count, 1, height, 1)
    columns = (left + torch.arange(width)).view(count, 1, 1, width)
    return padded[torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]
