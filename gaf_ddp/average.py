"""filter_average: the average of those that agree, of tensors that no engine averages, judged now.

sketch   = fold(tensors)                  (k,)    of each rank
ballots  = all_gather(sketch)             (W, k)  awaited, and judged
tensors *= share                                  this rank's own
all_reduce(tensors), all_reduce(share)
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.ballots.late import LateFilter
from gaf_ddp.connect import meet, warn_if_alone
from gaf_ddp.engines.shown import as_vector
from gaf_ddp.given import group_of, require_state
from gaf_ddp.kernels.fold import Span
from gaf_ddp.kernels.scale import correct
from gaf_ddp.runtime.errors import named
from gaf_ddp.settings import require
from gaf_ddp.state import GAFState
from gaf_ddp.way import Way

_WHOLE = ()  # the key of the one bucket that they all are


def filter_average(tensors: Iterable[Tensor], state: GAFState, process_group: dist.ProcessGroup | None = None) -> None:
    """Average tensors over the group in place, those of the ranks that agree: a collective.

        filter_average([p.grad for p in model.parameters()], state)       # a loop without DDP
        filter_average(outer_gradients, state := GAFState(momentum=0.9))  # local SGD, DiLoCo, federated rounds

    Judged by the consensus rule, now: this round's tensors with those of the rounds before. A round that is rare is
    worth more than a step of training; with a hundred rounds or less set `momentum=0.9`. Who is left out, or has what
    is not finite, adds zeros; a rank that is longer than `max_norm_ratio` upper medians is shortened to it. All ranks
    get the same bits: where all count the mean, to rounding. Where nobody had anything finite, NaN.

    Sends an all-reduce's bytes, 4 k + 200 bytes to each other rank, and waits for them. Takes memory for the tensors
    once more.

    Args:
        tensors: floating point or complex, on one device; as many in every round and on every rank, of the same
            shapes and dtypes in the same order. Not their names, but their order says which are which.
        state: of these alone, with the consensus rule; `state.step` counts rounds.
        process_group: None is the state's, or the default group.

    Raises:
        TypeError: tensors are none, or state is no GAFState.
        ValueError: tau, a weighting, check_every, or judge_every but 1 is set; there are no tensors, they are on
            several devices, or others than in the round before; the state has another process group or filters a
            model. On every rank: their settings or shapes differ.
    """
    require_state(state)
    found = list(tensors)
    way = state._way
    if way is None:
        _require_settings(state)
        way = _Rounds(state, group_of(state, process_group), _required(found))
        state._way = way
    if not isinstance(way, _Rounds):
        raise ValueError("state must be of these tensors alone, found one that filters a model: make another GAFState")
    require(process_group in (None, way.group), "process_group must be that of the first round", process_group)
    with torch.no_grad(), named(f"round {state.step}"):
        way.average(_required(found))


class _Rounds(Way):
    """The way of tensors that are averaged now."""

    def __init__(self, state: GAFState, group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> None:
        self.group, self._state, self._shapes = group, state, _shapes(tensors)
        device = tensors[0].device
        warn_if_alone(state, group, stacklevel=3)
        meet(state, group, device, {"tensors": self._shapes})
        self._late = LateFilter(state, group, device, in_buckets=False, every=1)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average them in place."""
        require(_shapes(tensors) == self._shapes, f"tensors must be as before, {self._shapes}", _shapes(tensors))
        late = self._late
        late.begin()
        square = late.ballot.new_square(_WHOLE)
        vectors = list(_flattened(tensors).values())
        place = 0
        for _, vector in vectors:
            late.ballot.fold(vector, (Span(0, place, len(vector)),), square)
            place += len(vector)
        late.vote()
        late.draw()
        for parts, vector in vectors:
            sent = vector if late.wire_dtype is None else vector.to(late.wire_dtype)
            share = late.share.scale(sent, _WHOLE, square)
            for each in (sent, share):
                dist.all_reduce(each, group=self.group)
            vector = correct(vector if sent is vector else vector.copy_(sent), share)
            for part, average in zip(parts, vector.split([each.numel() for each in parts]), strict=True):
                part.copy_(average.view_as(part))
        late.close()

    def read(self, loss: object) -> None:
        """Refuse held-out data: what is averaged is no gradient."""
        raise RuntimeError("reference is for models: filter_average has none to read with")

    def recall(self) -> None:
        """Begin with what the judge remembers."""
        self._late.recall()


def _flattened(tensors: Sequence[Tensor]) -> dict[torch.dtype, tuple[list[Tensor], Tensor]]:
    """Return, of each dtype, the tensors as real numbers, and a vector that they are copied to."""
    parts: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for each in tensors:
        real = torch.view_as_real(each) if each.is_complex() else each
        parts[real.dtype].append(real)
    return {dtype: (each, torch.cat([as_vector(part) for part in each])) for dtype, each in parts.items()}


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(each.shape)} {str(each.dtype).removeprefix('torch.')}" for each in tensors)


def _required(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    wrong = [each for each in tensors if not isinstance(each, Tensor) or each.layout != torch.strided]
    wrong += [each for each in tensors if not (each.is_floating_point() or each.is_complex())] if not wrong else []
    if wrong:
        rule = "tensors must be dense tensors of floating point or complex numbers"
        raise TypeError(f"{rule}, found {getattr(wrong[0], 'dtype', type(wrong[0]).__name__)}")
    require(bool(tensors), "tensors must hold at least one", tensors)
    devices = sorted({str(each.device) for each in tensors})
    require(len(devices) == 1, "tensors must be on one device", devices)
    return tensors


def _require_settings(state: GAFState) -> None:
    rule = "tau and weighting are not for averages, which the consensus rule judges: leave both None"
    require(state._is_consensus, rule, state.weighting or state.tau)
    require(state.judge_every in (None, 1), "judge_every must be None or 1 for averages", state.judge_every)
    require(
        state.check_every is None, "check_every must be None for averages: they are no gradients", state.check_every
    )
