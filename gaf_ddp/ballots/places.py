"""Where a model's parameters are among its elements, whatever an engine makes of them."""

from collections.abc import Sequence

from torch import Tensor

from gaf_ddp.kernels.fold import Spans, spans_of
from gaf_ddp.kernels.signs import mix

Key = tuple[int, ...]

_PLACES = 2**46  # signs are told apart up to twice as many


class Places:
    """Numbers the elements of a model in the order in which its parameters first come, the same on every rank.

    Engines bring parameters in the same order on all ranks, and in every process that runs the same job. So sketches
    mean the same after a restart, and when DDP lays its buckets out anew.

    Args:
        part: of a replica's model that this rank holds; its places are its own.
        parts: how many there are.
    """

    def __init__(self, part: int = 0, parts: int = 1) -> None:
        self.parameters: list[Tensor] = []  # in their order; held, so that no other takes an id
        self._most = _PLACES // parts
        self._next = self._first = part * self._most
        self._place: dict[int, int] = {}  # by id
        self._spans: dict[Key, Spans] = {}

    def spans(self, parameters: Sequence[Tensor], count: int | None = None) -> tuple[Key, Spans]:
        """Return what names these parameters together, and where the elements of their flat vector are.

        Args:
            parameters: one after the other in the vector.
            count: elements of a vector that an engine makes of them in a way of its own; None if they are as they are.
        """
        key = tuple(map(id, parameters))
        if key not in self._spans:
            counts = [numbers_of(each) if count is None else 0 for each in parameters]
            known = [self._place_of(*each) for each in zip(parameters, counts, strict=True)]
            if count is None:
                self._spans[key] = spans_of(zip(known, counts, strict=True))
            else:
                self._spans[key] = spans_of([(self._next, count)])
                self._next += count
        return key, self._spans[key]

    def ranges(self, parameters: Sequence[Tensor]) -> list[int]:
        """Give each of these a range of its own, as wide as can be, since an engine may make more of them than shows.

        Returned is where they begin: in columns of the sketch that are far from each other, so that the many short
        ones among them do not share a few.
        """
        self.parameters[:] = parameters
        width = self._most // len(self.parameters)
        return [self._first + number * width + mix(number) % 2**16 for number in range(len(self.parameters))]

    def _place_of(self, parameter: Tensor, count: int) -> int:
        if id(parameter) not in self._place:
            self._place[id(parameter)] = self._next
            self._next += count
            self.parameters.append(parameter)
        return self._place[id(parameter)]


def numbers_of(parameter: Tensor) -> int:
    """Return how many real numbers a bucket has of it: DDP makes two of a complex one."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)
