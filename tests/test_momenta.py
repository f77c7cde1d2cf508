"""Momenta against sums of explicit vectors in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from gaf_ddp import gram
from gaf_ddp.kernels.gram import Rows
from gaf_ddp.momenta import Momenta, judged
from tests.gradients import random_gradients

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)  # momenta are float32


def by_hand(steps: Tensor, decay: float) -> Tensor:
    """Return the momenta `(W, n)` after steps `(S, W, n)`, in float64."""
    momenta = torch.zeros_like(steps[0], dtype=torch.float64)
    for rows in steps.double():
        momenta = decay * momenta + rows
    return momenta


def some_steps(world_size: int, size: int = 900, count: int = 5) -> Tensor:
    return torch.stack([random_gradients(world_size, size, seed=s) for s in range(count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, torch.Tensor.unbind], ids=["matrix", "vectors"])
def test_the_gramian_is_that_of_the_momenta(
    form: Callable[[Tensor], Rows], world_size: int, dtype: torch.dtype
) -> None:
    steps = some_steps(world_size).to(dtype)
    momenta = Momenta(0.9)
    for rows in steps:
        measured = judged(momenta.measure("bucket", form(rows)))
    expected = by_hand(steps, 0.9)
    assert measured.dtype == torch.float64
    assert_close(measured, expected @ expected.T)


def test_slices_and_buckets_add_up() -> None:
    steps = some_steps(4)
    whole, left, right = Momenta(0.5), Momenta(0.5), Momenta(0.5)
    for rows in steps:
        expected = judged(whole.measure("all", rows))
        found = judged(left.measure("a", rows[:, :300]) + right.measure("b", rows[:, 300:]))
    assert_close(found, expected)


def test_rows_are_left_as_they_are_and_not_kept() -> None:
    momenta, rows = Momenta(0.9), random_gradients(3, 50, seed=0)
    before = rows.clone()
    first = momenta.measure("bucket", rows)
    assert torch.equal(rows, before)
    torch.testing.assert_close(judged(first), gram(before))
    rows.fill_(7.0)  # the exchange uses the rows' memory again
    assert_close(judged(momenta.measure("bucket", before)), 1.9**2 * gram(before))


def test_a_rank_without_a_gradient_is_absent_though_it_had_one() -> None:
    momenta, rows = Momenta(0.9), random_gradients(3, 50, seed=0)
    momenta.measure("bucket", rows)
    rows[1] = 0
    gramian = judged(momenta.measure("bucket", rows))
    assert not gramian[1].any()
    assert not gramian[:, 1].any()
    assert gramian[0, 2] != 0


def test_a_zero_slice_of_a_gradient_is_not_absent() -> None:
    rows = random_gradients(2, 50, seed=0)
    nothing = torch.zeros_like(rows)
    measured = Momenta(0.9).measure("a", rows) + Momenta(0.9).measure("b", nothing)
    torch.testing.assert_close(judged(measured), gram(rows))


def test_nan_stays_until_it_is_forgotten_and_reaches_no_other_rank() -> None:
    steps = some_steps(3)
    steps[0, 1, 5] = torch.nan
    momenta = Momenta(0.9)
    bad = judged(momenta.measure("bucket", steps[0]))
    assert bad[1, 1].isnan()
    assert bad[0, 2].isfinite()
    assert judged(momenta.measure("bucket", steps[1]))[1, 1].isnan()
    momenta.forget("bucket", torch.tensor([False, True, False]))
    good = judged(momenta.measure("bucket", steps[2]))
    expected = by_hand(steps[:3].nan_to_num(), 0.9)
    expected[1] = steps[2, 1].double()
    assert_close(good, expected @ expected.T)


@pytest.mark.parametrize("other", [random_gradients(3, 40, seed=1), random_gradients(2, 50, seed=1)])
def test_another_shape_begins_anew(other: Tensor) -> None:
    momenta = Momenta(0.9)
    momenta.measure("bucket", random_gradients(3, 50, seed=0))
    momenta.forget("bucket", torch.tensor([True, True, True]))
    torch.testing.assert_close(judged(momenta.measure("bucket", other)), gram(other))


def test_buckets_that_are_gone_are_not_remembered() -> None:
    momenta, rows = Momenta(0.9), random_gradients(2, 50, seed=0)
    momenta.measure("first layout", rows)
    momenta.finish()
    momenta.measure("second layout", rows)
    momenta.finish()
    torch.testing.assert_close(judged(momenta.measure("first layout", rows)), gram(rows))
    assert_close(judged(momenta.measure("second layout", rows)), 1.9**2 * gram(rows))


def test_an_empty_slice_has_a_gramian_of_zeros() -> None:
    assert not Momenta(0.9).measure("bucket", torch.empty(3, 0)).any()
