"""How gradients travel between ranks: buckets in, rows to judge out, the weighted average back.

An exchange moves bytes and adds numbers. Which rank counts how much is decided elsewhere, between `sum` and
`gather`. All ranks of the group must call the same methods in the same order. On the CPU a method returns when it is
done; on an accelerator it is enqueued on the current stream, and the host does not wait.
"""

from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """Three collectives, called in this order; the bucket is `(N,)`, any floating dtype, contiguous."""

    def scatter(self, bucket: Tensor) -> Tensor:
        """Return rows `(W, n)`: what this rank judges of every rank's bucket, in rank order."""
        ...

    def sum(self, measured: Tensor) -> Tensor:
        """Return what was measured on the whole buckets, the same bits on every rank.

        Measured `(W + r, W)`, which is overwritten: the Gramian of the rows, and below it r rows, this rank's own
        message, of which every rank has another, and which add up over the ranks.
        """
        ...

    def gather(self, rows: Tensor, weights: Tensor, bucket: Tensor) -> None:
        """Write the average of the rows by the weights `(W,)` into bucket, the same bits on every rank."""
        ...
