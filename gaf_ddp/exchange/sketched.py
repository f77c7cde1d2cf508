"""The exchange that judges sketches and leaves the gradients to the library's own all-reduce."""

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.exchange.sharded import ShardedExchange
from gaf_ddp.kernels.fold import fold, whole
from gaf_ddp.kernels.gram import combine
from gaf_ddp.runtime.collectives import all_gather_single, all_reduce_gramian

_MOST_GATHERED = 2**18  # bytes of sketches that a rank receives for each bucket


class SketchExchange:
    """Judge sketches; let the library's own all-reduce, with its trees and in-network sums, move the gradients.

    Every rank sends its bucket's sketch, k float32 numbers, to every other rank, and rows `(W, k)` are those: the
    same elements on every rank. Each is as long as its bucket, so that norms, and with them guards, are exact, and
    cosines are the sketches', to about 1/√k. A rank whose bucket is not finite has a row of NaN. Then each rank
    scales its own bucket by its own weight, in one pass, and the group all-reduces the sum.

    Sends an all-reduce's bytes and `(W − 1) k` numbers, adds up `W (2 W + 1)` float64 numbers, holds `W k`.
    Where that many numbers would be more than 256 KB, slices `(W, k/W)` of the sketches are exchanged in their
    place.

    Args:
        group: the W ranks.
        size: k.
        wire_dtype: dtype the scaled buckets are all-reduced in; None is the bucket's.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, wire_dtype: torch.dtype | None = None) -> None:
        self._group = group
        self._size = size
        self._wire_dtype = wire_dtype
        self._slices = ShardedExchange(group)

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole sketches of all ranks."""
        return 4 * self._size * (self._group.size() - 1) <= _MOST_GATHERED

    def scatter(self, bucket: Tensor) -> Tensor:
        """All-gather sketches, rows `(W, k)`, or exchange slices of them."""
        sketch = as_long_as(*fold(bucket, whole(len(bucket)), self._size))
        if not self.whole:
            return self._slices.scatter(sketch)
        rows = sketch.new_empty(self._group.size(), self._size)
        all_gather_single(rows.view(-1), sketch, group=self._group)
        return rows

    def sum(self, measured: Tensor) -> Tensor:
        """Return rank 0's, and every rank's message: each has it all, but unlike machines round unlike."""
        if self.whole and self._group.rank() != 0:
            measured[: self._group.size()] = 0
        return all_reduce_gramian(measured, self._group)

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """Scale this rank's bucket `(N,)` by its weight and all-reduce it; a left-out rank adds zeros."""
        rank = self._group.rank()
        share = bucket if self._wire_dtype is None else torch.empty_like(bucket, dtype=self._wire_dtype)
        combine(bucket[None], weights[rank : rank + 1], out=share)
        dist.all_reduce(share, group=self._group)
        if share is not bucket:
            bucket.copy_(share)


def as_long_as(sketch: Tensor, square: Tensor) -> Tensor:
    """Return the sketch `(k,)` scaled to a squared norm `()`: NaN where that is not finite."""
    wide, norm = sketch.double(), square.sqrt()
    length = torch.linalg.vector_norm(wide)
    first = torch.arange(len(wide), device=wide.device) == 0  # holds the norm alone where signs cancelled all else
    scaled = torch.where(length > 0, wide * (norm / length), torch.where(first, norm, 0))
    return torch.where(norm.isfinite(), scaled, torch.nan).float()
