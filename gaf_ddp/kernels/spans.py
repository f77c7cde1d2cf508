"""Where the elements of a vector are in the model, and the rows of p columns that they are folded as."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gaf_ddp.kernels.signs import block_length, period_of, shift_and_sign


class Span(NamedTuple):
    """Elements of a vector that follow each other in the model too.

    Attributes:
        first: where they begin in the vector.
        place: where they begin in the model, from 0 to 2^47.
        count: how many they are.
    """

    first: int
    place: int
    count: int  # type: ignore[assignment]  # tuples have a method of that name


Spans = tuple[Span, ...]


def whole(count: int) -> Spans:
    """Return the spans of a vector that is all there is."""
    return (Span(0, 0, count),)


def spans_of(counts: Iterable[tuple[int, int]]) -> Spans:
    """Return the spans of a vector of parts `(place, count)` that follow each other in it; merge neighbours."""
    spans: list[Span] = []
    first = 0
    for place, count in counts:
        last = spans[-1] if spans else None
        if last is not None and last.place + last.count == place:
            spans[-1] = last._replace(count=last.count + count)
        elif count:
            spans.append(Span(first, place, count))
        first += count
    return tuple(spans)


def rows_in(span: Span, period: int) -> int:
    """Return how many rows of p columns a span touches."""
    return -(-(span.place % period + span.count) // period)


@lru_cache(maxsize=2**14)  # of parameters by themselves there are many
def row_table(spans: Spans, size: int, device: torch.device) -> Tensor:
    """Return the rows of p columns that a vector is folded as, int64 `(rows, 4)`.

    Of each row: which element of the vector its column 0 would be, may be negative; the first column that holds an
    element, and the one after the last; where its signs begin in `both_signs`.
    """
    period, length = period_of(size), block_length(size)
    rows = []
    for first, place, count in spans:
        for row in range(place // period, place // period + rows_in(Span(first, place, count), period)):
            start = row * period
            low, high = max(place - start, 0), min(place + count - start, period)
            shift, sign = shift_and_sign(start // length, length)
            rows.append((first + start - place, low, high, shift + start % length + (4 * length if sign < 0 else 0)))
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(device)
