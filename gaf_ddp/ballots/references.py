"""Readings of held-out data on their way: two sketches that a later ballot carries, once all ranks have them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gaf_ddp.ballots.ballot import Numbers
from gaf_ddp.engines.apart import Loss, gradient_of
from gaf_ddp.rules.reference import TEMPERATURES


class References:
    """One rank's readings.

    A ballot says whether a reading waits. When all ranks' ballots said so, which everyone learns a step later, the
    next ballot is longer by the two sketches. So ballots are always as long on all ranks, and nobody has to wait to
    find out whether the others have read too.

    Attributes:
        due: whether the next ballot carries a reading.
    """

    def __init__(self) -> None:
        self.due = False
        self._waiting: tuple[Tensor, Tensor] | None = None  # (2 k,), and its loss ()

    def put(self, readings: Sequence[Tensor], loss: Tensor) -> None:
        """Take a reading, two sketches `(k,)` float32 and the second one's loss, in place of one that still waits."""
        self._waiting = torch.cat(list(readings)), loss

    def read(
        self, loss: Loss, parameters: Sequence[Tensor], model: nn.Module | None, fold: Callable[[Tensor], Tensor]
    ) -> None:
        """Take the sketches, by `fold`, of a loss's two gradients `(N,)`, apart from training."""
        found = [gradient_of(loss, temperature, parameters, model) for temperature in TEMPERATURES]
        self.put([fold(gradient) for gradient, _ in found], found[-1][1])

    def append_to(self, sketch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a ballot's sketch `(k,)`, and behind it the reading, `(3 k,)`, if it is due; and the loss.

        A rank that waits for the others in DDP's Join has none, and sends zeros.
        """
        if not self.due:
            return sketch, None
        waiting, self.due, self._waiting = self._waiting, False, None
        reading, loss = waiting or (sketch.new_zeros(2 * len(sketch)), None)
        return torch.cat([sketch, reading]), loss

    @property
    def is_waiting(self) -> bool:
        """Whether a reading waits for a ballot."""
        return self._waiting is not None

    def require(self, numbers: Numbers) -> None:
        """Learn from all ranks' ballots whether the next one carries a reading.

        Raises:
            RuntimeError: on every rank: some have read held-out data, and some not.
        """
        training = numbers.finished == 0
        read = numbers.referenced != 0
        self.due = bool(read.any())
        if self.due and not bool(read[training].all()):
            have, lack = ((which & training).nonzero().flatten().tolist() for which in (read, ~read))
            rule = "state.reference must be called on every rank, between the same steps"
            raise RuntimeError(f"{rule}, found it called on ranks {have} and not on ranks {lack}")


def split(rows: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Return all ranks' sketches `(W, k)`, and their readings `(W, 2, k)` if the ballots `(W, k or 3 k)` have them."""
    return rows[:, :size], rows[:, size:].view(len(rows), 2, size) if rows.shape[1] > size else None
