"""Host memory that is used again: fresh pages cost a large bucket as much time as its sums."""

from threading import Lock

import torch
from torch import Tensor

CACHE_LINE = 64  # bytes


class Workspace:
    """CPU memory that is used again. Holds what was in use at once, at most, plus what no longer fits."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}
        self._lock = Lock()

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised matrix `(rows, columns)`, in the smallest free memory that holds it.

        Each row begins a cache line: products of rows that do not take longer.
        """
        stride = -(-columns * dtype.itemsize // CACHE_LINE) * CACHE_LINE // dtype.itemsize
        size = rows * stride * dtype.itemsize
        with self._lock:
            fitting = [i for i, memory in enumerate(self._free) if memory.numel() >= size]
            if fitting:
                memory = self._free.pop(fitting[0])
            else:  # the largest free memory is too small: replace it
                del self._free[-1:]
                memory = torch.empty(size, dtype=torch.uint8)
            if size:
                self._lent[memory.untyped_storage().data_ptr()] = memory
        return memory[:size].view(dtype).view(rows, stride)[:, :columns]

    def give_back(self, part: Tensor) -> None:
        """Let what `take` returned, all of it, be used again; any part of it will do."""
        with self._lock:
            memory = self._lent.pop(part.untyped_storage().data_ptr(), None)
            if memory is not None:
                self._free.append(memory)
                self._free.sort(key=Tensor.numel)
