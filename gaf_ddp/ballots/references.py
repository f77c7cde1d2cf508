"""Readings of held-out data on their way: two sketches that a later ballot carries, once all ranks have them."""

import torch
from torch import Tensor

from gaf_ddp.ballots.ballot import Numbers


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
        self._waiting: Tensor | None = None  # (2 k,)

    def put(self, readings: Tensor) -> None:
        """Take a reading, sketches `(2, k)` float32, in place of one that still waits."""
        self._waiting = readings.flatten()

    def append_to(self, sketch: Tensor) -> Tensor:
        """Return a ballot's sketch `(k,)`, and behind it the reading, `(3 k,)`, if it is due.

        A rank that waits for the others in DDP's Join has none, and sends zeros.
        """
        if not self.due:
            return sketch
        reading = sketch.new_zeros(2 * len(sketch)) if self._waiting is None else self._waiting
        self.due, self._waiting = False, None
        return torch.cat([sketch, reading])

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
