"""A rank's share of the sum and the sum's correction: every way against float64, and what must not be touched."""

import math

import pytest
import torch
from torch import Tensor

from gaf_ddp.kernels.scale import correct, scale
from tests.kernels.interpreter import INTERPRETED, outside_the_interpreter, run_interpreted
from tests.kernels.ways import WAYS, take
from tests.syncs import HostSyncs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = [0, 1, 1000, 40_001]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one of the ways, which is taken."""
    return take(request.param, "scale", monkeypatch)


def normal(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(device, dtype)


def number(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def scaled(gradient: Tensor, count: float, limit: float = math.inf, square: float | None = None) -> list[float]:
    """Scale in place, by the gradient's own norm if none is said, and return the share."""
    norm = gradient.double().square().sum() if square is None else number(square, gradient.device)
    share = scale(gradient, norm, number(count, gradient.device), number(limit, gradient.device))
    assert (share.shape, share.dtype) == ((2,), torch.float64)
    return share.tolist()


def assert_close(found: Tensor, exact: Tensor) -> None:
    """Rounded once to half precision (the interpreter cuts bfloat16 off), and to some units in float32."""
    eps = max(torch.finfo(found.dtype).eps, 2e-16)
    units = {torch.float32: 1.5, torch.float64: 4}.get(found.dtype, 1.01 if INTERPRETED else 0.501)
    tiny = torch.finfo(found.dtype).smallest_normal * eps
    assert ((found.double() - exact).abs() <= units * eps * exact.abs() + tiny).all()


@every_dtype
@pytest.mark.parametrize("length", LENGTHS)
def test_a_rank_that_counts_is_divided_and_shortened(device: torch.device, length: int, dtype: torch.dtype) -> None:
    for count in (1, 2, 3, 7, 1000):
        for limit in (math.inf, 1e9, 2.5, 0.03, 0.0, math.nan):
            gradient = normal(length, dtype, device)
            exact = gradient.double().clone()
            norm = exact.square().sum().sqrt().item()
            share = scaled(gradient, count, limit)
            assert share == [1 / count if norm else 0, 0]
            assert_close(gradient, exact * (1 / count) * (limit / norm if norm > limit else 1))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 49, 1000])
def test_what_is_not_shortened_is_what_torch_makes_of_it(
    device: torch.device, count: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """`div_` by a Python number, bit for bit, which divides on CPUs and multiplies by 1/count on GPUs."""
    gradient = normal(10_000, dtype, device)
    on_cpu = request.node.callspec.params["device"] == "cpu"
    expected = gradient.clone().div_(count) if on_cpu else gradient.float() * torch.tensor(1 / count).float()
    scaled(gradient, count)
    if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter does not round
        torch.testing.assert_close(gradient, expected.to(dtype))
    else:
        assert torch.equal(gradient, expected.to(dtype))


@every_dtype
def test_who_does_not_count_adds_zeros_and_never_multiplies(device: torch.device, dtype: torch.dtype) -> None:
    for bad, square in ((math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)):
        for count in (0, 3):
            for limit in (math.inf, 1.0):
                gradient = normal(5000, dtype, device)
                gradient[::7] = bad
                assert scaled(gradient, count, limit, square) == [0, 1]
                assert gradient.tolist() == [0.0] * 5000
    gradient = normal(5000, dtype, device)
    assert scaled(gradient, 0) == [0, 0]
    assert gradient.tolist() == [0.0] * 5000
    assert scaled(gradient, 3, 0.0) == [0, 0]  # a gradient of zeros says nothing
    assert gradient.tolist() == [0.0] * 5000


@pytest.mark.parametrize("norm", [1e-30, 1e-20, 1e20, 1e30])
def test_limits_of_norms_beyond_float32s_squares(device: torch.device, norm: float) -> None:
    gradient = norm * torch.nn.functional.normalize(normal(1000, torch.float32, device), dim=0)
    exact = gradient.double() / 3 * 0.25
    assert scaled(gradient, 3, norm / 4, norm * norm) == [1 / 3, 0]
    assert_close(gradient, exact)


@every_dtype
@pytest.mark.parametrize("length", LENGTHS)
def test_a_sum_that_counts_as_expected_is_left_alone(device: torch.device, length: int, dtype: torch.dtype) -> None:
    for counted in (1.0, 1 + 9e-7, 1 - 9e-7, sum([1 / 49] * 49)):
        total = normal(length, dtype, device)
        before = total.clone()
        assert correct(total, torch.tensor([counted, 1.0], dtype=torch.float64, device=device)) is total
        assert torch.equal(total, before)


@every_dtype
@pytest.mark.parametrize("counted", [2 / 3, 1 / 7, 1.5, 1 + 2e-6, 1 - 2e-6, 1 / 1000])
def test_a_sum_that_lacks_some_is_divided_by_what_counted(
    device: torch.device, counted: float, dtype: torch.dtype
) -> None:
    for length in LENGTHS:
        total = normal(length, dtype, device)
        exact = total.double() / counted
        correct(total, torch.tensor([counted, 1.0], dtype=torch.float64, device=device))
        assert_close(total, exact)


@every_dtype
def test_a_sum_of_nobody_is_nan_where_somebody_was_not_finite(device: torch.device, dtype: torch.dtype) -> None:
    for broken in (0.0, 1.0, 5.0):
        total = torch.zeros(5000, dtype=dtype, device=device)
        correct(total, torch.tensor([0.0, broken], dtype=torch.float64, device=device))
        assert total.isnan().all() if broken else not total.any()


@every_dtype
def test_shares_of_the_ranks_that_counted_correct_the_sum(device: torch.device, dtype: torch.dtype) -> None:
    """Five should count, one of them has NaN, and one did not expect to: the sum is the mean of four."""
    gradients = [normal(1000 + i, dtype, device)[:1000] for i in range(6)]
    exact = torch.stack(gradients)[:4].double().mean(0)
    gradients[4][3] = math.nan
    counts = [5, 5, 5, 5, 5, 0]
    squares = [g.double().square().sum() for g in gradients]
    shares = [
        scale(g, square, number(count, device), number(math.inf, device))
        for g, square, count in zip(gradients, squares, counts, strict=True)
    ]
    total = correct(torch.stack(gradients).sum(0), torch.stack(shares).sum(0))
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


@outside_the_interpreter
def test_accelerators_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = take("accelerator", "scale", monkeypatch)
    gradient, three = normal(1000, torch.float32, device), number(3, device)
    with HostSyncs() as syncs:
        correct(gradient, scale(gradient, three, three, three))
    assert syncs.calls == []


@outside_the_interpreter
@pytest.mark.job
@pytest.mark.timeout(600)
def test_values_in_the_interpreter() -> None:
    run_interpreted(__file__, "-k", "triton")
