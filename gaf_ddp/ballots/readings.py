"""Readings of held-out data on their way: two sketches that a later ballot carries, once all ranks have them."""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gaf_ddp.ballots.ballot import Numbers
from gaf_ddp.engines.apart import Loss, gradient_of
from gaf_ddp.rules.held_out import TEMPERATURES
from gaf_ddp.runtime.device import read_here

_logger = logging.getLogger(__name__)


class Readings:
    """One rank's readings.

    A ballot says whether a reading waits. When all ranks' ballots said so, which everyone learns a step later, the
    next ballot is longer by the two sketches. So ballots are always as long on all ranks, and nobody has to wait to
    find out whether the others have read too. Readings are numbered, the same on all ranks, so that a ballot that was
    long on its way asks for none that has gone already.

    Args:
        rank: this one's, which a warning names.

    Attributes:
        waiting: the number of the reading that waits for a ballot, from 1 on; 0 where none does.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._told, self._has_warned = rank, 0, False  # _told: the last reading whose losses are known
        self.waiting = 0
        self._put = 0  # the number of the last reading,
        self._due = self._sent = 0  # of what the next ballot carries, and of what the last ones carried
        self._waiting: tuple[Tensor, Tensor] | None = None  # (2 k,), and its loss ()

    def put(self, readings: Sequence[Tensor], loss: Tensor) -> None:
        """Take a reading, two sketches `(k,)` float32 and the second one's loss, in place of one that still waits."""
        self._put += 1
        self.waiting, self._waiting = self._put, (torch.cat(list(readings)), loss)

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
        if not self._due:
            return sketch, None
        waiting, self._waiting, self.waiting = self._waiting, None, 0
        self._sent, self._due = self._due, 0
        reading, loss = waiting or (sketch.new_zeros(2 * len(sketch)), None)
        for each in waiting or ():
            read_here(each)  # FSDP2 reads held-out data on one stream, and votes on another
        return torch.cat([sketch, reading]), loss

    def require(self, numbers: Numbers) -> None:
        """Learn from all ranks' ballots whether the next one carries a reading; warn of a loss that is not finite.

        Raises:
            RuntimeError: on every rank: some have read held-out data, and some not.
        """
        if self._sent > self._told:
            self._told = self._sent
            if not numbers.finished[self._rank]:
                self._warn_if_empty(float(numbers.loss[self._rank]))
        training = numbers.finished == 0
        read, latest = numbers.referenced != 0, int(numbers.referenced.max())
        self._due = latest if latest > self._sent else 0
        if latest and not bool(read[training].all()):
            have, lack = ((which & training).nonzero().flatten().tolist() for which in (read, ~read))
            rule = "state.reference must be called on every rank, between the same steps"
            raise RuntimeError(f"{rule}, found it called on ranks {have} and not on ranks {lack}")

    def _warn_if_empty(self, loss: float) -> None:
        if not math.isfinite(loss) and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "gaf_ddp: the held-out loss of rank %d is %f, and its share does not count: has it any examples?",
                self._rank,
                loss,
            )


def split(rows: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Return all ranks' sketches `(W, k)`, and their readings `(W, 2, k)` if the ballots `(W, k or 3 k)` have them."""
    return rows[:, :size], rows[:, size:].view(len(rows), 2, size) if rows.shape[1] > size else None
