"""The fused kernels: their values in Triton's interpreter, and that they compile for GPUs, without a GPU."""

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from packaging.version import Version

from gaf_ddp import Agreement, NeighborhoodAgreement, SequentialAgreement, agreement, gramian, verdict
from gaf_ddp.agreement import decide

triton = pytest.importorskip("triton")

# triton.language decides at import whether its functions are interpreted: hence a process of its own.
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = torch.cuda.is_available() and not interpreted
needs_kernels = pytest.mark.skipif(not (interpreted or on_gpu), reason="runs in the interpreter or on a GPU")
DEVICE = torch.device("cuda" if on_gpu else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Triton 3.6's interpreter converts arrays of one element to scalars, which NumPy 2.4 refuses; 3.9's does not.
unlucky_pair = Version(triton.__version__) < Version("3.9") and Version(np.__version__) >= Version("2.4")


@pytest.mark.skipif(interpreted, reason="is the interpreter's process itself")
@pytest.mark.skipif(unlucky_pair, reason="this Triton's interpreter needs an older NumPy")
def test_values_in_the_interpreter() -> None:
    """Everything below, with TRITON_INTERPRET=1; nothing may be skipped there but the compilation."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-rs", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 skipped" in done.stdout, done.stdout  # this test and the compilations


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 3, 8, 17])
def test_gram_against_float64(world_size: int, dtype: torch.dtype) -> None:
    from gaf_ddp import _triton

    for columns in (1, 1100):
        rows = torch.randn(world_size, columns, device=DEVICE).to(dtype)
        assert _triton.can_gram(rows)
        exact = rows.double() @ rows.double().T
        # Products of 1/4 Ki terms in float32: 4e-7 of the largest entry was the worst seen.
        assert (_triton.gram(rows) - exact).abs().max() <= 2e-6 * exact.abs().max()


@needs_kernels
def test_a_row_with_nan_or_inf_spoils_its_own_row_and_column_only() -> None:
    from gaf_ddp import _triton

    for dtype, bad in product(DTYPES, (torch.nan, torch.inf)):
        rows = torch.randn(5, 700, device=DEVICE).to(dtype)
        rows[2, 650] = bad
        finite = _triton.gram(rows).isfinite()
        expected = torch.ones(5, 5, dtype=torch.bool, device=DEVICE)
        expected[2, :] = expected[:, 2] = False
        assert torch.equal(finite, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_against_float64_without_touching_left_out_rows(dtype: torch.dtype) -> None:
    from gaf_ddp import _triton

    for world_size, columns in product((2, 3, 70), (1, 4099)):
        rows = torch.randn(world_size, columns, device=DEVICE).to(dtype)
        weights = torch.rand(world_size, device=DEVICE)
        weights[::2] = 0
        exact = weights.double() @ rows.double()
        rows[::2] = torch.nan
        out = _triton.combine(rows, weights, torch.empty(columns, dtype=dtype, device=DEVICE))
        torch.testing.assert_close(out, exact.to(dtype))  # torch's default tolerance for the dtype


@needs_kernels
def test_a_nan_weight_makes_the_result_nan() -> None:
    from gaf_ddp import _triton

    rows, weights = torch.randn(3, 10, device=DEVICE), torch.full((3,), torch.nan, device=DEVICE)
    assert _triton.combine(rows, weights, torch.empty(10, device=DEVICE)).isnan().all()


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


def _assert_equal(fused: tuple[torch.Tensor, ...], reference: Agreement, case: object) -> None:
    names = ("cosine", "weights", "kept", "agreed", "voters", "nonfinite", "overlong")
    for name, value in zip(names, fused, strict=True):
        expected = getattr(reference, name)
        torch.testing.assert_close(
            value.cpu(), expected, equal_nan=True, msg=lambda m, n=name: f"{n}, {case}: {m}"
        )


@needs_kernels
@pytest.mark.parametrize("world_size", [2, 3, 7, 33, 130])
def test_the_decision_equals_the_reference(world_size: int) -> None:
    from gaf_ddp import _triton_decision

    for case in range(27 if world_size < 33 else 8):
        measured = gramian.gram(_awkward_rows(world_size, case))
        tau, ratio = (0.25, 0.875, 1.0, 2.0, 0.0)[case % 5], (10.0, None)[case % 2]
        for rule in _rules(tau):
            assert _triton_decision.can_decide(measured.to(DEVICE), rule)
            fused = _triton_decision.decide(measured.to(DEVICE), rule, ratio)
            _assert_equal(fused, decide(measured, rule, ratio), (case, rule))


@needs_kernels
@pytest.mark.parametrize("world_size", [2, 5, 16])
def test_the_decision_and_the_average_in_one_launch(world_size: int) -> None:
    """The record and the average of the reference, without touching a left-out row, in blocks of 1024 columns."""
    from gaf_ddp import _triton_decision

    for case in range(1, 14):
        dtype = DTYPES[case % 3]
        judged = gramian.gram(_awkward_rows(world_size, case))
        ratio, columns = (10.0, None)[case % 2], (1, 4099)[case % 2]
        rows = torch.randn(world_size, columns, device=DEVICE).to(dtype)
        for rule in _rules((0.25, 0.875, 1.0, 2.0)[case % 4]):
            reference = decide(judged, rule, ratio)
            exact = gramian.combine(rows.double().cpu(), reference.weights.double())
            spoilt = torch.where((reference.weights == 0).to(DEVICE)[:, None], torch.nan, rows)
            out = torch.empty(columns, dtype=dtype, device=DEVICE)
            assert _triton_decision.can_decide_and_combine(judged.to(DEVICE), rule, spoilt, out)
            fused = _triton_decision.decide_and_combine(judged.to(DEVICE), rule, ratio, spoilt, out)
            _assert_equal(fused, reference, (case, rule))
            torch.testing.assert_close(out.cpu(), exact.to(dtype), equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("world_size", [2, 17])
def test_a_verdict_decides_in_its_first_average_of_few_ranks(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gaf_ddp import _triton_decision

    launches = []
    launch = _triton_decision._launch
    monkeypatch.setattr(verdict, "kernels", lambda device, name: _triton_decision)
    monkeypatch.setattr(agreement, "kernels", lambda device, name: _triton_decision)
    monkeypatch.setattr(_triton_decision, "_launch", lambda *case: launches.append(case[3]) or launch(*case))
    rows = torch.randn(world_size, 50, device=DEVICE)
    found = verdict.Verdict(gramian.gram(rows), NeighborhoodAgreement(1.0), 10.0)
    averages = [found.combine(rows), found.combine(rows)]
    assert [combined is not None for combined in launches] == [world_size <= 16]  # one launch decides
    torch.testing.assert_close(averages[0], averages[1])
    torch.testing.assert_close(averages[0], gramian.combine(rows, found.weights))


@pytest.mark.skipif(interpreted, reason="the interpreter does not compile")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spilling(capability: int) -> None:
    """For one W of each code path, by Triton's compiler and its bundled assembler; no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from gaf_ddp import _triton, _triton_decision

    flags = {name: "*i1" for name in ("keeps", "agreed", "votes", "nonfinites", "overlongs")}
    decision = {"gramian": "*fp32", "cosine": "*fp64", "weights": "*fp32", **flags, "tau": "fp32", "ratio": "fp32"}
    gram = {"rows": "*fp32", "partial": "*fp32", "columns": "i32"}
    wide = {"COUNT": 64, "PADDED": 64, "BLOCK": 128, "IN_REGISTERS": False, "PRECISION": "tf32x3"}
    narrow = {"COUNT": 8, "PADDED": 8, "BLOCK": 128, "IN_REGISTERS": True, "PRECISION": "tf32x3"}
    rule = {"FACTOR": 0.5, "BLOCK": 1024}
    alone = rule | {"COMBINES": False, "rows": None, "out": None}
    many = alone | {"COUNT": 1000, "PADDED": 1024, "TILE": 8}
    few = rule | {"COUNT": 15, "PADDED": 16, "TILE": 16, "COMBINES": True}
    rows_in = gram | {"out": "*fp32"}
    for kernel, types, constants in (
        (_triton._gram_kernel, gram, narrow),
        (_triton._gram_kernel, gram, wide),
        (_triton._combine_kernel, rows_in | {"weights": "*fp32"}, {"COUNT": 8, "BLOCK": 2048}),
        *(
            (_triton_decision._decision_kernel, decision | rows_in, c | {"SEQUENTIAL": s})
            for c in (many, few)
            for s in (True, False)
        ),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        warps = 8 if constants.get("PADDED") == 1024 else 4
        options = {"num_warps": warps, **_triton.OPTIONS}
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert "ld.local" not in compiled.asm["ptx"]
        assert compiled.asm["cubin"]
