"""The fused kernels: their values in Triton's interpreter, and that they compile for GPUs, without a GPU."""

from itertools import product
from pathlib import Path

import pytest
import torch

from gaf_ddp.kernels.gram import gram
from gaf_ddp.rules.agreement import Agreement, decide
from gaf_ddp.rules.neighborhood import NeighborhoodAgreement
from gaf_ddp.rules.sequential import SequentialAgreement
from tests.kernels.interpreter import DEVICE, INTERPRETED, needs_kernels, outside_the_interpreter, run_interpreted
from tests.kernels.spills import spilled_bytes

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


MOST_SPILLED = 64  # bytes, above 16 ranks: 40 with Triton 3.6, none with 3.8


@outside_the_interpreter
@pytest.mark.job
@pytest.mark.timeout(600)
def test_values_in_the_interpreter() -> None:
    """Everything below, with TRITON_INTERPRET=1; nothing may be skipped there but this test and compilations."""
    said = run_interpreted(__file__)
    assert ", 3 skipped" in said, said


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 3, 8, 17])
def test_gram_against_float64(world_size: int, dtype: torch.dtype) -> None:
    from gaf_ddp.kernels import gram_triton

    for columns in (1, 1100):
        rows = torch.randn(world_size, columns, device=DEVICE).to(dtype)
        assert gram_triton.can_gram(rows)
        exact = rows.double() @ rows.double().T
        # Products of 1/4 Ki terms in float32: 4e-7 of the largest entry was the worst seen.
        assert (gram_triton.gram(rows) - exact).abs().max() <= 2e-6 * exact.abs().max()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 5, 17])
def test_gram_of_norms_beyond_float32s_squares(world_size: int, dtype: torch.dtype) -> None:
    from gaf_ddp.kernels import gram_triton

    columns = 300 if INTERPRETED else 1100  # which takes the interpreter seconds per Gramian
    for scales in ([1e-30, 1e30], [1e-20, 1.0], [1e20, 1e-12], [0.0, 1.0]):
        rows = torch.nn.functional.normalize(torch.randn(world_size, columns, dtype=torch.float64), dim=1)
        rows = (rows * torch.tensor(scales * world_size)[:world_size, None].double()).to(dtype).to(DEVICE)
        exact = rows.double() @ rows.double().T
        norms = exact.diagonal().sqrt()
        error = (gram_triton.gram(rows) - exact).abs()
        if rows.isfinite().all():  # float16 cannot hold them all
            assert (error <= 2e-6 * norms[:, None] * norms[None, :]).all()


@needs_kernels
def test_a_row_with_nan_or_inf_spoils_its_own_row_and_column_only() -> None:
    from gaf_ddp.kernels import gram_triton

    for dtype, bad in product(DTYPES, (torch.nan, torch.inf)):
        rows = torch.randn(5, 700, device=DEVICE).to(dtype)
        rows[2, 650] = bad
        finite = gram_triton.gram(rows).isfinite()
        expected = torch.ones(5, 5, dtype=torch.bool, device=DEVICE)
        expected[2, :] = expected[:, 2] = False
        assert torch.equal(finite, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_against_float64_without_touching_left_out_rows(dtype: torch.dtype) -> None:
    from gaf_ddp.kernels import gram_triton

    for world_size, columns in product((2, 3, 70), (1, 4099)):
        rows = torch.randn(world_size, columns, device=DEVICE).to(dtype)
        weights = torch.rand(world_size, device=DEVICE)
        weights[::2] = 0
        exact = weights.double() @ rows.double()
        rows[::2] = torch.nan
        out = gram_triton.combine(rows, weights, torch.empty(columns, dtype=dtype, device=DEVICE))
        torch.testing.assert_close(out, exact.to(dtype))  # torch's default tolerance for the dtype


@needs_kernels
def test_a_nan_weight_makes_the_result_nan() -> None:
    from gaf_ddp.kernels import gram_triton

    rows, weights = torch.randn(3, 10, device=DEVICE), torch.full((3,), torch.nan, device=DEVICE)
    assert gram_triton.combine(rows, weights, torch.empty(10, device=DEVICE)).isnan().all()


def _awkward_rows(world_size: int, case: int) -> torch.Tensor:
    """Return rows of which some are absent, too long, alike, or all of one kind, by the case's number."""
    rows = torch.randn(world_size, max(2, world_size // 2), generator=torch.Generator().manual_seed(case))
    if case % 3 == 0:
        rows[0] = torch.nan
    if case % 4 == 0:
        rows[-1] = 0
    if case % 5 == 0:
        rows[world_size // 2] *= 1000
    if case % 7 == 0:
        rows[1] = rows[0]
    if case % 11 == 0:
        rows[:] = torch.inf
    if case % 13 == 0:
        rows[:] = 0
    return rows


def _rules(tau: float) -> list[NeighborhoodAgreement | SequentialAgreement]:
    return [NeighborhoodAgreement(tau), SequentialAgreement(tau), SequentialAgreement(tau, running="half")]


def _assert_equal(fused: Agreement, reference: Agreement, case: object) -> None:
    for name in ("cosine", "weights", "kept", "agreed", "voters", "nonfinite", "overlong"):
        found, expected = getattr(fused, name).cpu(), getattr(reference, name)
        torch.testing.assert_close(found, expected, equal_nan=True, msg=f"{name}, {case}: {found} {expected}")


@needs_kernels
@pytest.mark.parametrize("world_size", [2, 3, 7, 33, 130])
def test_the_decision_equals_the_reference(world_size: int) -> None:
    from gaf_ddp.kernels import decide_triton

    for case in range({33: 8, 130: 3}.get(world_size, 27)):
        measured = gram(_awkward_rows(world_size, case))
        tau, ratio = (0.25, 0.875, 1.0, 2.0, 0.0)[case % 5], (10.0, None)[case % 2]
        for rule in _rules(tau):
            assert decide_triton.can_decide(measured.to(DEVICE), rule)
            fused = decide_triton.decide(measured.to(DEVICE), rule, ratio)
            _assert_equal(fused, decide(measured, rule, ratio), (case, rule))


@needs_kernels
@pytest.mark.parametrize("tau", [0.9, 0.97, 0.3])
def test_tau_is_as_exact_as_in_the_reference(tau: float) -> None:
    from gaf_ddp.kernels import decide_triton

    for nudge in (-1e-12, 0.0, 1e-12):  # float32 would take these for one
        cosine = 1 - tau + nudge
        pair = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        for rule in _rules(tau):
            fused = decide_triton.decide(pair.to(DEVICE), rule, 10.0)
            _assert_equal(fused, decide(pair, rule, 10.0), (nudge, rule))


@outside_the_interpreter
@pytest.mark.job
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spilling(capability: int, tmp_path: Path) -> None:
    """Up to 16 ranks none spills; above, gram of 64 float32 rows, and decisions of 1000, at most what is said."""
    from gaf_ddp.kernels import decide_triton, gram_triton

    shared = {"partial": "*fp64", "units": "i32"}
    for count, (name, dtype) in product((2, 4, 8, 16, 64), (("fp32", torch.float32), ("bf16", torch.bfloat16))):
        fixed, warps = gram_triton.constants(count, dtype)
        types = shared | {"rows": f"*{name}"}
        spilled = spilled_bytes(gram_triton._gram_kernel, types, {"ALIGN": 16, **fixed}, warps, capability, tmp_path)
        assert spilled <= (0 if count <= 16 else MOST_SPILLED), (count, name, spilled)
    types = {"rows": "*fp32", "weights": "*fp64", "out": "*fp32", "units": "i32"}
    fixed = {"ALIGN": 16, "COUNT": 8, "BLOCK": 1024}
    assert spilled_bytes(gram_triton._combine_kernel, types, fixed, 8, capability, tmp_path) == 0
    flags = {name: "*i1" for name in ("keeps", "agreed", "votes", "nonfinites", "overlongs")}
    types = {"gramian": "*fp64", "cosine": "*fp64", "weights": "*fp64", **flags, "tau": "fp64", "ratio": "fp64"}
    for sequential, (count, padded, tile, warps) in product((True, False), ((15, 16, 16, 4), (1000, 1024, 4, 8))):
        fixed = {"COUNT": count, "PADDED": padded, "TILE": tile, "SEQUENTIAL": sequential}
        spilled = spilled_bytes(
            decide_triton._decision_kernel, types, {**fixed, "FACTOR": 0.5}, warps, capability, tmp_path
        )
        assert spilled <= (0 if count <= 16 else MOST_SPILLED), (count, spilled)
