"""Which share of the average a rank has: who counts by the last verdict, and what that makes of a gradient."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.ballots.limits import Limits
from gaf_ddp.ballots.places import Key
from gaf_ddp.kernels.scale import scale
from gaf_ddp.runtime.device import to_device

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState


class Share:
    """The share of one rank.

    Args:
        state: the settings.
        group: the W ranks that gradients are averaged over.
        device: of the gradients.
        averages: whether the engine divides by W what it adds up: shares add up to W then, else to 1.
        asks: as `Limits` has it.

    Attributes:
        kept: bool `(W,)` on the host, who counts by the last verdict.
        limits: the longest norms by it.
    """

    def __init__(
        self, state: "GAFState", group: dist.ProcessGroup, device: torch.device, averages: bool, asks: bool
    ) -> None:
        self._state, self._group, self._device = state, group, device
        self._unit = group.size() if averages else 1
        self._equal = torch.tensor([self._unit / group.size(), 0.0], dtype=torch.float64).to(device)
        self.kept = torch.ones(group.size(), dtype=torch.bool)
        self.limits = Limits(group, device, asks)
        self._mode: tuple[bool, bool] | None = None

    def begin_step(self) -> bool:
        """Look at what may be assigned while training; return whether who counts has changed by that."""
        mode = self._state.watch, self._state.step < self._state.start_step
        if self._mode == mode:
            return False
        self._mode = mode
        self.set(self.kept)
        return True

    def set(self, kept: Tensor) -> None:
        """Let these count from now on, bool `(W,)`."""
        self.kept = kept
        counted = self.counted()
        number = float(counted.sum()) / self._unit if counted[self._group.rank()] else 0.0
        # How many ranks count now, or which part of W; 0 where this one does not.
        self._number = number
        self._divisor = to_device(torch.tensor(number, dtype=torch.float64), self._device)

    def counted(self) -> Tensor:
        """Return who counts in this step, bool `(W,)`."""
        everyone = self._state.watch or self._state.step < self._state.start_step
        return torch.ones_like(self.kept) if everyone else self.kept

    def weigh(self, gradient: Tensor) -> Tensor | None:
        """Return the gradient `(N,)` scaled by the share alone, whatever is in it; None where it is as it was."""
        if self._number == 1 or self._state.watch:
            return None
        return gradient / self._number if self._number else torch.zeros_like(gradient)

    def scale(self, gradient: Tensor, key: Key, square: Tensor, out: Tensor | None = None) -> Tensor:
        """Scale the gradient `(N,)` of a bucket of this squared norm by the share, in place or into `out`.

        Returned is the share `(2,)`, as `kernels.scale` has it.
        """
        limit = self.limits.of(key, square, self._state.max_norm_ratio)
        if not self._state.watch and self._group.size() > 1:
            return scale(gradient, square, self._divisor, limit, out)
        result = gradient if out is None else out
        if self._unit == 1:
            torch.div(gradient, self._group.size(), out=result)  # as torch's `allreduce_hook`: NaN passes
        elif out is not None:
            out.copy_(gradient)
        return self._equal.clone()
