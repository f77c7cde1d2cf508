"""How gradients travel between ranks: buckets in, rows to judge out, the weighted average back.

An exchange moves bytes and adds numbers. Which rank counts how much is decided elsewhere, between `sum` and
`gather`. All ranks of the group must call the same methods in the same order.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from gaf_ddp.kernels.gram import Rows


class Exchange(Protocol):
    """Three collectives, called in this order; the bucket is `(N,)`, any floating dtype, contiguous."""

    def scatter(self, bucket: Tensor) -> Callable[[], Rows]:
        """Return a function that waits for the rows and returns them.

        Rows `(W, n)`: the elements this rank judges, of every rank's bucket, in rank order. Only `PeerExchange`
        starts sending at once; the others, whose collectives must keep their order, when the function is called.
        """
        ...

    def sum(self, measured: Tensor) -> Tensor:
        """Return what was measured on the whole buckets, the same bits on every rank.

        Measured `(W + r, W)`: the Gramian of the rows, and below it r rows, this rank's own message, of which every
        rank has another, and which add up over the ranks.
        """
        ...

    def gather(self, rows: Rows, weights: Tensor, bucket: Tensor) -> Callable[[], None] | None:
        """Write the average of the rows by the weights `(W,)` into bucket, the same bits on every rank.

        Return a function that waits until it is all there, or None where the device's stream, or the call, already
        did. The rows are the exchange's again after this.
        """
        ...
