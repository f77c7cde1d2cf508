"""Judging ranks by their recent gradients: one batch's cosines are mostly noise, those of momenta are less so.

A rank's momentum is `m ← decay · m + g`. Judged momenta tell a bad rank from an unlucky one, and show a bias too
small to see in any one gradient (Karimireddy, He, Jaggi, "Learning from History", ICML 2021, average the momenta
themselves). Here only the judgement rests on them; what is averaged are the ranks' present gradients, so any
optimizer will do and nothing more travels than W numbers.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

from gaf_ddp.gramian import gram


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

    def measure(self, key: Hashable, rows: Tensor) -> Tensor:
        """Add the rows `(W, n)` of the bucket called key to its momenta.

        A bucket that is new, or of another shape than before, begins anew.

        Returns:
            `(W + 1, W)`: the Gramian of the momenta and, below it, the largest magnitude in each row, which says
            who has a gradient at all. Both may be added up over slices and buckets.
        """
        momenta = self._momenta.get(key)
        if momenta is None or momenta.shape != rows.shape or momenta.device != rows.device:
            momenta = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
            self._momenta[key] = momenta
        else:
            forgotten = self._forgotten.pop(key, None)
            if forgotten is not None and (momenta.device.type != "cpu" or bool(forgotten.any())):
                momenta.masked_fill_(forgotten[:, None], 0)
            momenta.mul_(self._decay).add_(rows)
        self._used.add(key)
        size = torch.linalg.vector_norm(rows, torch.inf, 1) if rows.shape[1] else rows.new_zeros(len(rows))
        return torch.cat([gram(momenta), size[None].to(momenta.dtype)])

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
