"""What a rank does at once, by itself: gradients that are not finite, zero, or far too long."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ballots.test_late import alike
from tests.ballots.training import SIZES, TINY, N, Trained, averaged, train

Ranks = Callable[..., list[Any]]

# After the first step, by the sizes of their parameters.
BUCKETS = {"200": slice(311, N), "11+300": slice(0, 311)}


def assert_averages(trained: Trained, gradients: Tensor, step: int, kept: list[int], tolerance: float = 1e-6) -> None:
    expected = gradients[step, kept].double().mean(0)
    assert (trained.gradients[step] - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_who_is_not_finite_is_out_at_once_and_back_at_once(ranks: Ranks, step: int, bad: float) -> None:
    gradients = alike(4, 6)
    gradients[step, 1, ::5] = bad  # in every bucket
    for trained in ranks(4, train, gradients, {}):
        for other in range(6):
            assert_averages(trained, gradients, other, [0, 2, 3] if other == step else [0, 1, 2, 3])
        assert trained.summary["gaf/nonfinite_fraction"] == pytest.approx(1 / 24)


def test_where_nobody_is_finite_all_get_nan(ranks: Ranks) -> None:
    gradients = alike(3, 3)
    gradients[1] = torch.nan
    for trained in ranks(3, train, gradients, {}):
        assert trained.gradients[1].isnan().all()
        assert_averages(trained, gradients, 2, [0, 1, 2])


@pytest.mark.parametrize("step", [0, 2])
def test_zero_is_in_no_divisor_in_any_bucket(ranks: Ranks, step: int) -> None:
    gradients = alike(4, 4)
    gradients[step, 3] = 0
    for trained in ranks(4, train, gradients, {}):
        assert_averages(trained, gradients, step, [0, 1, 2])
        assert trained.summary["gaf/zero_fraction"] == pytest.approx(1 / 16)


def test_zeros_everywhere_are_zeros_and_no_decision(ranks: Ranks) -> None:
    gradients = alike(3, 4)
    gradients[2] = 0
    for trained in ranks(3, train, gradients, {}):
        assert not trained.gradients[2].any()
        assert trained.summary["gaf/zero_fraction"] == 0
        assert trained.summary["gaf/kept_fraction"] == 1


@pytest.mark.parametrize("step", [0, 1, 3])
def test_who_is_too_long_is_shortened_to_the_limit(ranks: Ranks, step: int) -> None:
    gradients = alike(4, 5)
    gradients[step, 2] *= 1000
    for trained in ranks(4, train, gradients, {"max_norm_ratio": 4.0}):
        expected = gradients[step].double().clone()
        spans = [slice(0, N)] if step == 0 else BUCKETS.values()
        for span in spans:
            # In a process's first step, and in the first one of a bucket, by the norms of the step itself.
            norms = gradients[step if step < 2 else step - 1, :, span].double().norm(dim=1).sort().values
            own = gradients[step, 2, span].double()
            expected[2, span] = own * (4.0 * norms[2] / own.norm())
        assert (trained.gradients[step] - expected.mean(0)).norm() < 1e-5 * expected.mean(0).norm()
        assert trained.summary["gaf/overlong_fraction"] > 0 or step < 2


def test_limits_are_upper_medians_of_the_last_verdict(ranks: Ranks) -> None:
    gradients = alike(4, 4)
    for trained in ranks(4, train, gradients, {}):
        for step in (1, 2, 3):
            for name, span in BUCKETS.items():
                norms = gradients[step, :, span].double().norm(dim=1).sort().values
                assert trained.limits[step][name] == pytest.approx(10 * norms[2].item(), rel=1e-6)


def test_everybody_a_thousandfold_is_shortened_once_and_nobody_out(ranks: Ranks) -> None:
    gradients = alike(4, 8)
    gradients[4:] *= 1000
    for trained in ranks(4, train, gradients, {}):
        assert trained.kept.all()
        ratio = trained.gradients[4].norm() / gradients[4].double().mean(0).norm()
        assert 0.005 < ratio < 0.02  # ten medians in place of a thousand
        assert_averages(trained, gradients, 5, [0, 1, 2, 3])


def test_a_rank_alone_too_long_is_out_by_the_next_verdict(ranks: Ranks) -> None:
    gradients = alike(4, 8)
    gradients[4:, 0] *= 1000
    for trained in ranks(4, train, gradients, {}):
        assert not trained.kept[4:, 0].any()
        assert_averages(trained, gradients, 5, [1, 2, 3])


@pytest.mark.parametrize("world_size", [2, 4])
def test_half_of_the_ranks_with_small_gradients_do_not_shorten_the_others(ranks: Ranks, world_size: int) -> None:
    gradients = alike(world_size, 6)
    gradients[:, : world_size // 2] *= 0.01  # as of nearly masked batches
    plain = ranks(world_size, averaged, gradients)[0]
    for trained in ranks(world_size, train, gradients, {}):
        assert (trained.gradients[0] - plain[0]).norm() <= 1e-6 * plain[0].norm()
        assert trained.summary["gaf/overlong_fraction"] == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e30])
@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_any_norm_and_default_dtype_is_judged_right(ranks: Ranks, scale: float, default: torch.dtype) -> None:
    gradients = alike(4, 6) * scale
    gradients[:, 1] *= -1
    for trained in ranks(4, train_with_default, gradients, default):
        assert not trained.kept[2:, 1].any()
        assert_averages(trained, gradients, 5, [0, 2, 3])


def train_with_default(device: torch.device, gradients: Tensor, default: torch.dtype) -> Trained:
    torch.set_default_dtype(default)
    return train(device, gradients, {}, TINY)


def test_no_limit_lets_long_gradients_pass(ranks: Ranks) -> None:
    gradients = alike(4, 2)
    gradients[0, 3] *= 1000
    for trained in ranks(4, train, gradients, {"max_norm_ratio": None}):
        assert_averages(trained, gradients, 0, [0, 1, 2, 3])
    assert sum(SIZES) == N
