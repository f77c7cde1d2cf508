"""gram, combine and filter_gradients against float64, on every dtype and device here."""

import math

import pytest
import torch
from torch import Tensor

from gaf_ddp.kernels.gram import combine, filter_gradients, gram
from gaf_ddp.rules.neighborhood import NeighborhoodAgreement
from gaf_ddp.rules.sequential import SequentialAgreement
from tests import oracle
from tests.gradients import random_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LENGTHS = [0, 1, 2, 15, 1000, 16_384, 16_385, 262_145, 300_001]  # about and beyond the chunks the package works in

# The largest errors seen up to a million elements: gram 2.2e-6 of |row i||row j|
# (2.4e-14 for float64), combine 2.0e-7 of the weighted sum of the rows' magnitudes, before it is rounded once.
GRAM_TOLERANCE = {"float32": 1e-5, "float64": 1e-13}
COMBINE_TOLERANCE = 1e-6

every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_length = pytest.mark.parametrize("length", LENGTHS)


def some_rows(world_size: int, length: int, dtype: torch.dtype, device: str) -> Tensor:
    return random_gradients(world_size, length, seed=length).to(device, dtype)


@every_device
@every_dtype
@every_length
def test_gram_equals_float64(length: int, dtype: torch.dtype, device: str) -> None:
    for world_size in (1, 2, 3, 7, 9):
        rows = some_rows(world_size, length, dtype, device)
        exact = rows.double() @ rows.double().T
        found = gram(rows)
        assert found.dtype == torch.float64
        assert found.shape == (world_size, world_size)
        lengths = exact.diagonal().sqrt()
        tolerance = GRAM_TOLERANCE["float64" if dtype == torch.float64 else "float32"]
        assert ((found.double() - exact).abs() <= tolerance * lengths[:, None] * lengths[None, :]).all()


@every_device
@every_dtype
@every_length
def test_combine_equals_float64(length: int, dtype: torch.dtype, device: str) -> None:
    for world_size in (1, 2, 3, 7):
        rows = some_rows(world_size, length, dtype, device)
        weights = torch.linspace(-0.5, 1, world_size, device=device).double()
        weights[world_size // 2] = 0.0
        exact = weights @ rows.double()
        found = combine(rows, weights)
        assert found.dtype == dtype
        assert found.shape == (length,)
        info = torch.finfo(dtype)
        rounding = info.eps / 2 * exact.abs().clamp(min=info.smallest_normal)
        summing = min(COMBINE_TOLERANCE, 10 * info.eps) * (weights.abs() @ rows.double().abs())
        assert ((found.double() - exact).abs() <= rounding + summing).all()


@every_device
@every_dtype
def test_combine_writes_into_any_dtype(dtype: torch.dtype, device: str) -> None:
    rows, weights = some_rows(3, 17_000, dtype, device), torch.tensor([0.25, 0.0, 0.75], device=device)
    for out_dtype in DTYPES:
        out = torch.full((17_000,), math.nan, device=device, dtype=out_dtype)
        found = combine(rows, weights, out=out)
        assert found is out
        wide = combine(rows.double() if dtype == torch.float64 else rows.float(), weights)
        torch.testing.assert_close(out, wide.to(out_dtype))


@every_device
def test_sums_of_half_precision_stay_in_float32(device: str) -> None:
    # The square sum of these is over float16's range.
    eights = torch.full((2, 100_000), 8.0, dtype=torch.float16, device=device)
    assert gram(eights).tolist() == [[6_400_000.0] * 2] * 2
    rows = torch.full((257, 4), 1.0, dtype=torch.bfloat16, device=device)  # bfloat16 cannot count to 257
    assert combine(rows, torch.ones(257, device=device), out=torch.empty(4, device=device)).tolist() == [257.0] * 4


@every_device
def test_gram_does_not_drift_with_length(device: str) -> None:
    # A plain float32 product of rows with a mean was off by 3e-4 at 5 M elements; in chunks 4e-7 was measured.
    rows = torch.rand(2, 2_000_000, generator=torch.Generator().manual_seed(0)).to(device)
    exact = rows.double() @ rows.double().T
    assert ((gram(rows).double() - exact).abs() / exact).max().item() < 2e-6


@every_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float, device: str) -> None:
    rows = some_rows(4, 20_000, torch.float32, device)
    clean = gram(rows)
    rows[2, -1] = bad
    found = gram(rows)
    assert not found[2, 2].isfinite()
    others = torch.tensor([0, 1, 3], device=device)
    assert torch.equal(found[others][:, others], clean[others][:, others])


@every_device
@every_dtype
def test_a_row_of_weight_0_is_never_multiplied(dtype: torch.dtype, device: str) -> None:
    rows = some_rows(4, 100, dtype, device)
    weights = torch.tensor([0.5, 0.0, 0.5, 0.0], device=device)
    clean = combine(rows, weights)
    rows[1], rows[3] = math.nan, math.inf
    assert torch.equal(combine(rows, weights), clean)
    assert combine(rows, torch.zeros(4, device=device)).tolist() == [0.0] * 100


@every_device
def test_a_weight_of_nan_makes_the_result_nan(device: str) -> None:
    rows = some_rows(2, 100, torch.float32, device)
    assert combine(rows, torch.tensor([0.5, math.nan], device=device)).isnan().all()


def test_rows_may_be_views() -> None:
    wide = random_gradients(6, 500)
    rows = wide[::2, 100:400]
    assert torch.equal(gram(rows), gram(rows.clone()))
    assert torch.equal(combine(rows, torch.ones(3)), combine(rows.clone(), torch.ones(3)))


@every_device
@every_dtype
def test_combine_may_write_over_one_of_the_rows(dtype: torch.dtype, device: str) -> None:
    weightings = [[0.2, 0.3, 0.5, 0.4], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    for length in (5, 300_001):
        for weights in weightings:
            for rank in range(4):
                rows = some_rows(4, length, dtype, device)
                expected = combine(rows, torch.tensor(weights, device=device))
                found = combine(rows, torch.tensor(weights, device=device), out=rows[rank])
                assert found.data_ptr() == rows[rank].data_ptr()
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("world_size", [3, 9])
def test_autocast_changes_nothing(world_size: int) -> None:
    rows = random_gradients(world_size, 1000)
    plain = gram(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram(rows), plain)
        assert combine(rows, torch.ones(world_size)).dtype == torch.float32


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_filter_gradients_equals_the_oracle(world_size: int) -> None:
    rows = random_gradients(world_size, 5000, seed=world_size)
    for weighting, rule in [
        (NeighborhoodAgreement(0.8), oracle.neighborhood(0.8)),
        (SequentialAgreement(0.8), oracle.sequential(0.8)),
        (SequentialAgreement(0.8, running="half"), oracle.sequential(0.8, "half")),
    ]:
        oracle.assert_close(filter_gradients(rows, weighting), oracle.filtered(list(rows), rule, None).gradient)
    spoilt = torch.cat([rows, torch.full((1, 5000), math.nan)])
    found = filter_gradients(spoilt, NeighborhoodAgreement(0.8))
    oracle.assert_close(found, oracle.filtered(list(rows), oracle.neighborhood(0.8), None).gradient)


@pytest.mark.parametrize(
    "rows", [torch.ones(3), torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 2, 3), torch.ones(0, 3)]
)
def test_refuses_what_is_no_matrix(rows: Tensor) -> None:
    for call in (gram, lambda rows: combine(rows, torch.ones(2))):
        with pytest.raises(ValueError, match=r"rows must be a floating point matrix \(W, n\), found") as error:
            call(rows)
        assert f"{tuple(rows.shape)} of {rows.dtype}" in str(error.value)


def test_refuses_weights_and_out_that_do_not_fit() -> None:
    rows = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weights must have shape \(2,\), one per row, found \(3,\)"):
        combine(rows, torch.ones(3))
    with pytest.raises(ValueError, match=r"out must have shape \(3,\), found \(4,\)"):
        combine(rows, torch.ones(2), out=torch.empty(4))
