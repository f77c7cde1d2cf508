"""A hash of tensors' bits, in which replicas are compared: as fast as two folds, and never a wait for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor

_COLUMNS = 4096  # of the matrix that a tensor is hashed as
_BLOCK = 2**15, 2**24  # numbers hashed at a time, each in 8 bytes: in the CPU's cache, and on an accelerator
_WORDS = {1: torch.uint8, 2: torch.int16}  # by bytes of an element; else int32


def hash_bits(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Return an int64 `()` on the device that follows from every bit of the tensors and from its place.

    The sum, modulo 2^64, of the elements' bits, each times an odd pseudo-random number of its place: equal for
    unequal tensors in one of 2^31 cases, with bits flipped, elements swapped or negated. Never waits for
    an accelerator. None counts as a tensor without elements.
    """
    total, row = torch.zeros((), dtype=torch.int64, device=device), 0
    for tensor in tensors:
        row += 1
        if tensor is None or not tensor.numel():
            continue
        rows = _hashed_rows(tensor.detach().contiguous().view(-1))
        total += (rows * _multipliers(row, len(rows), rows.device)).sum().to(device)
        row += len(rows)
    return total


def _hashed_rows(flat: Tensor) -> Tensor:
    """Return the sums of a vector's bits, in rows of 4096 and what is left, by their columns' numbers, int64."""
    words = flat.view(_WORDS.get(flat.element_size(), torch.int32))
    columns = _multipliers(2**40, min(_COLUMNS, len(words)), words.device)
    whole = len(words) // _COLUMNS * _COLUMNS
    rest = words[whole:]
    rows = [(rest * columns[: len(rest)]).sum(0, keepdim=True)]
    if whole:
        blocks = words[:whole].view(-1, _COLUMNS).split(_BLOCK[flat.device.type != "cpu"] // _COLUMNS)
        product = torch.empty_like(blocks[0], dtype=torch.int64)  # taken once: new memory is slower than all else
        rows += [torch.mul(block, columns, out=product[: len(block)]).sum(1) for block in blocks]
    return torch.cat(rows)


def _multipliers(first: int, count: int, device: torch.device) -> Tensor:
    """Return odd pseudo-random numbers for so many places, int64 `(count,)`: splitmix64's steps."""
    mixed = torch.arange(first, first + count, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)) | 1
