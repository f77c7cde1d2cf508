"""Judging ranks by their recent gradients: one batch's cosines are mostly noise, those of momenta are less so.

A rank's momentum is `m ← decay · m + g`. Judged momenta tell a bad rank from an unlucky one, and show a bias too
small to see in any one gradient (Karimireddy, He, Jaggi, "Learning from History", ICML 2021, average the momenta
themselves). Here only the judgement rests on them; what is averaged are the ranks' present gradients, so any
optimizer will do and nothing more travels than W numbers.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

from gaf_ddp.device import on_host
from gaf_ddp.gramian import Rows, gram


class Momenta:
    """The momenta of all ranks' gradients, for the elements that are judged here; one matrix per bucket.

    Memory: as much as the rows in float32, that is one gradient per rank with a sharded exchange, W with gather.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._momenta: dict[Hashable, Tensor] = {}
        self._used: set[Hashable] = set()
        self._forgotten: dict[Hashable, Tensor] = {}  # bool (W,): whose momenta begin anew

    def anew(self) -> "Momenta":
        """Return momenta with the same decay and nothing in them."""
        return Momenta(self._decay)

    def measure(self, key: Hashable, rows: Rows) -> Tensor:
        """Add the rows `(W, n)` of the bucket called key to its momenta.

        A bucket that is new, or of another shape than before, begins anew.

        Returns:
            `(W + 1, W)`: the Gramian of the momenta and, below it, the largest magnitude in each row, which says
            who has a gradient at all. Both may be added up over slices and buckets.
        """
        shape, like = (len(rows), len(rows[0])), rows[0]
        momenta = self._momenta.get(key)
        if momenta is None or momenta.shape != shape or momenta.device != like.device:
            momenta = torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
            self._momenta[key] = momenta
        else:
            forgotten = self._forgotten.pop(key, None)
            if forgotten is not None and (not on_host(momenta) or bool(forgotten.any())):
                momenta.masked_fill_(forgotten[:, None], 0)
        momenta.mul_(self._decay)
        # A matrix in few launches, however many ranks; vectors one by one, where they lie.
        for momentum, row in [(momenta, rows)] if isinstance(rows, Tensor) else zip(momenta, rows, strict=True):
            momentum.add_(row)
        self._used.add(key)
        return torch.cat([gram(momenta), _largest(rows).double()[None]])

    def forget(self, key: Hashable, ranks: Tensor) -> None:
        """Let the momenta of some ranks, bool `(W,)`, begin anew at the next step: one NaN would stay for ever."""
        self._forgotten[key] = ranks

    def finish(self) -> None:
        """End a step: momenta of buckets that it did not have go, as DDP has laid its buckets out anew."""
        self._momenta = {key: self._momenta[key] for key in self._used}
        self._used = set()


def judged(measured: Tensor) -> Tensor:
    """Return the Gramian `(W, W)` of what `measure` returned, without the ranks that have no gradient now."""
    gramian, size = measured[:-1], measured[-1]
    here = size != 0  # NaN is something
    return torch.where(here[:, None] & here[None, :], gramian, 0)


def _largest(rows: Rows) -> Tensor:
    """Return the largest magnitude of each row `(W,)`, 0 for rows without elements."""
    if not len(rows[0]):
        return rows[0].new_zeros(len(rows))
    if isinstance(rows, Tensor):
        largest: Tensor = torch.linalg.vector_norm(rows, torch.inf, 1)
        return largest
    return torch.stack([torch.linalg.vector_norm(row, torch.inf) for row in rows])
