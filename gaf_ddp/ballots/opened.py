"""A ballot that is being filled, by one step or several."""

import torch
from torch import Tensor

from gaf_ddp.ballots.places import Key
from gaf_ddp.kernels.fold import Spans, fold_into
from gaf_ddp.runtime.device import require_device


class OpenBallot:
    """One rank's ballot until it is sent.

    Args:
        size: k, numbers of the sketch.
        device: of the gradients.

    Attributes:
        sketch: `(k,)` float32, of all gradients so far.
        squares: of each bucket its squared norms `()` float64, one a step.
        steps: how many are in it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self.sketch = torch.zeros(size, dtype=torch.float32, device=device)
        self.squares: dict[Key, list[Tensor]] = {}
        self.steps = 0

    def new_square(self, key: Key) -> Tensor:
        """Return what a bucket's squared norm of this step is added up in, `()` float64."""
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        self.squares.setdefault(key, []).append(square)
        return square

    def fold(self, gradient: Tensor, spans: Spans, square: Tensor) -> None:
        """Add a part of a bucket's gradient `(N,)`, and its squared norm to that."""
        require_device(gradient, self._device)
        fold_into(gradient, spans, self.sketch, square)

    def summed(self) -> Tensor:
        """Return of each bucket the sum of its squared norms over the steps, float64 `(buckets,)`."""
        each = [torch.stack(steps).sum() if len(steps) > 1 else steps[0] for steps in self.squares.values()]
        return torch.stack(each)
