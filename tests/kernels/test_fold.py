"""The fold: every way against explicit signs in float64, and parts of a gradient that add up to the whole's."""

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaf_ddp.kernels.fold import Span, Spans, fold, fold_into, spans_of, whole
from gaf_ddp.kernels.signs import block_length, period_of, signs_at
from tests.fuzz import fuzzed
from tests.kernels.interpreter import INTERPRETED, outside_the_interpreter, run_interpreted
from tests.kernels.ways import WAYS, WITH_TRITON, take
from tests.syncs import HostSyncs

SIZES = (64, 100, 1000, 4096)


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one of the ways, which is taken."""
    return take(request.param, "fold", monkeypatch)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths(size: int) -> list[int]:
    """Return lengths N at which a fold may trip, up to several blocks; few of these where they take seconds."""
    few = [0, 1, size - 1, size, size + 1, 10 * size + 3]
    return few if INTERPRETED and size != 100 else [*few, block_length(size), 2 * block_length(size) + 12_345]


def scattered(length: int, size: int) -> Spans:
    """Return spans of parts of any length, one of them empty, that lie anywhere in a model of many blocks."""
    draw = random.Random(length)
    cuts = sorted({0, length, *(draw.randrange(length + 1) for _ in range(5))})
    blocks = draw.sample(range(10**6), len(cuts))
    places = [block * 3 * block_length(size) + draw.randrange(2 * block_length(size)) for block in blocks]
    parts = list(zip(cuts, places, (b - a for a, b in pairwise(cuts)), strict=False))
    return tuple(Span(*part) for part in [*parts, (length, places[-1], 0)])


def reference(x: Tensor, spans: Spans, size: int) -> Tensor:
    """Return the sketch `(k,)` in float64, element by element as fold.py defines it."""
    places = torch.full((len(x),), -1)
    for first, place, count in spans:
        places[first : first + count] = torch.arange(place, place + count)
    sketch = torch.zeros(size, dtype=torch.float64)
    return sketch.index_add_(0, places % period_of(size), signs_at(places, size) * x.cpu().double())


def assert_near(found: tuple[Tensor, Tensor], x: Tensor, spans: Spans, size: int) -> None:
    """The sketch equals the reference to 1e-6 of its length, the squared norm to 1e-6 of itself.

    Squares of half precision numbers are rounded all one way: they are off by 1.1e-6 in plain torch on CPUs.
    """
    sketch, square = found[0].cpu(), found[1].cpu()
    expected = reference(x, spans, size)
    assert (sketch.dtype, square.dtype, sketch.shape) == (torch.float32, torch.float64, (size,))
    assert (sketch.double() - expected).norm() <= 1e-6 * expected.norm()
    assert not sketch[period_of(size) :].any()
    tolerance = 1e-6 if x.dtype.itemsize > 2 else 3e-6
    torch.testing.assert_close(square, x.cpu().double().square().sum(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_each_way_is_the_reference(device: torch.device, size: int, dtype: torch.dtype) -> None:
    for length in lengths(size) if dtype == torch.float32 or not INTERPRETED else lengths(size)[:6]:
        x = normal(length, seed=length).to(device, dtype)
        for spans in (whole(length), scattered(length, size)):
            assert_near(fold(x, spans, size), x, spans, size)
    assert_near(fold(x[:0], (), size), x[:0], (), size)


def test_fold_into_adds_to_what_is_there(device: torch.device) -> None:
    x, spans = normal(5000).to(device), scattered(5000, 100)
    sketch, square = normal(100).to(device), torch.tensor(3.0, dtype=torch.float64, device=device)
    before, (folded, norm) = (sketch.clone(), square.clone()), fold(x, spans, 100)
    fold_into(x, spans, sketch, square)
    torch.testing.assert_close(sketch, before[0] + folded, rtol=0, atol=1e-6 * folded.norm().item())
    torch.testing.assert_close(square, before[1] + norm, rtol=1e-12, atol=0)
    fold_into(x[:0], (), sketch, square)
    torch.testing.assert_close(sketch, before[0] + folded, rtol=0, atol=1e-6 * folded.norm().item())


def test_it_is_the_same_every_time(device: torch.device) -> None:
    x, spans = normal(20_000).to(device), scattered(20_000, 1000)
    for once, again in zip(fold(x, spans, 1000), fold(x, spans, 1000), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("way", WITH_TRITON)
def test_sums_of_more_programs_than_a_tile_holds(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 32 rows of partial sketches, and more than 1024 partial squares, as a large GPU has."""
    device = take(way, "fold", monkeypatch)
    monkeypatch.setattr("gaf_ddp.kernels.fold_triton.programs_on", lambda _: 1200)
    x = normal(640 * 4093).to(device)
    assert_near(fold(x, whole(len(x)), 4096), x, whole(len(x)), 4096)


@outside_the_interpreter
def test_accelerators_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device, spans = take("accelerator", "fold", monkeypatch), scattered(5000, 100)
    x, (sketch, square) = normal(5000).to(device), fold(normal(5000).to(device), spans, 100)
    with HostSyncs() as syncs:
        fold(x, spans, 100)
        fold_into(x, spans, sketch, square)
    assert syncs.calls == []


# Parts of a gradient.


@outside_the_interpreter
@fuzzed(30)
@given(st.data(), st.sampled_from([64, 1000, 4096]))
def test_parts_add_up_to_the_whole_however_it_is_cut_and_in_any_order(data: st.DataObject, size: int) -> None:
    length = data.draw(st.sampled_from([1000, 5000, 300_000]))
    x = normal(length, seed=size)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=8))), length]
    parts = data.draw(st.permutations([(a, b - a) for a, b in pairwise(cuts)]))
    expected = fold(x, whole(length), size)
    sketch, square = torch.zeros(size), torch.zeros((), dtype=torch.float64)
    for place, count in parts:  # buckets, each by itself
        fold_into(x[place : place + count], (Span(0, place, count),), sketch, square)
    shuffled = torch.cat([x[place : place + count] for place, count in parts])  # and one vector of all of them
    for found in ((sketch, square), fold(shuffled, spans_of(parts), size)):
        assert (found[0] - expected[0]).norm() <= 1e-6 * expected[0].norm()
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)


# The edges.


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e15, 1e30])
def test_norms_beyond_the_squares_of_float32(device: torch.device, scale: float) -> None:
    count = 20_000 if INTERPRETED else 300_000
    x, spans = scale * normal(count).to(device), whole(count)
    assert_near(fold(x, spans, 100), x, spans, 100)
    x[1000:] = 0
    assert_near(fold(x, spans, 100), x, spans, 100)
    x[-5:] = 1.0  # a block of one and blocks of the other
    assert_near(fold(x, spans, 100), x, spans, 100)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_both(device: torch.device, bad: float) -> None:
    count = 10_000 if INTERPRETED else 300_000
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = normal(count).to(device, dtype)
        x[-29] = bad
        sketch, square = fold(x, whole(count), 100)
        assert not square.isfinite()
        assert sketch.isfinite().logical_not().nonzero().flatten().tolist() == [(count - 29) % 97]


def test_zeros_have_a_sketch_of_zeros(device: torch.device) -> None:
    sketch, square = fold(torch.zeros(10_000, device=device), whole(10_000), 100)
    assert not sketch.any()
    assert square == 0


@outside_the_interpreter
def test_what_does_not_fit_is_refused() -> None:
    x, square = torch.ones(3), torch.zeros((), dtype=torch.float64)
    for wrong in (torch.ones(3, 3), torch.ones(3, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x must be a floating point vector \(N,\), found "):
            fold(wrong, whole(3), 64)
    for size in (63, 0, -4096):
        with pytest.raises(ValueError, match=f"size must be at least 64 numbers, found {size}"):
            fold(x, whole(3), size)
    with pytest.raises(ValueError, match="spans must cover x, found 2 of 3 elements"):
        fold(x, whole(2), 64)
    with pytest.raises(ValueError, match="size must be at least 64 numbers, found 63"):
        fold_into(x, whole(3), torch.zeros(63), square)
    for sketch in (torch.zeros(64).double(), torch.zeros(2, 64), torch.zeros(128)[::2]):
        with pytest.raises(ValueError, match=r"sketch must be a contiguous vector \(k,\) of torch.float32, found "):
            fold_into(x, whole(3), sketch, square)
    for norm in (square.float(), square[None]):
        with pytest.raises(ValueError, match=r"square must be \(\) of torch.float64, found "):
            fold_into(x, whole(3), torch.zeros(64), norm)


@outside_the_interpreter
@pytest.mark.job
@pytest.mark.timeout(600)
def test_values_in_the_interpreter() -> None:
    run_interpreted(__file__, "-k", "triton")
