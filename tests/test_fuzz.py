"""Whatever gradients come: gram, combine, fold and decisions against float64, within the tolerances below."""

from dataclasses import fields
from typing import Literal

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gaf_ddp import (
    Agreement,
    ConsensusAgreement,
    Mean,
    NeighborhoodAgreement,
    SequentialAgreement,
    Weighting,
    combine,
    gram,
)
from gaf_ddp.kernels import fold as folds
from gaf_ddp.kernels.signs import period_of
from gaf_ddp.rules.agreement import decide
from tests import oracle
from tests.fuzz import DTYPES, LENGTHS, Drawn, clear_of_the_guard, fuzzed, gradients, unless_rounding_decides
from tests.kernels.test_fold import reference
from tests.properties import (
    assert_blind_to_absent,
    assert_convex,
    assert_permutation_equivariant,
    assert_pure,
    assert_scale_invariant,
    gramian_of,
)
from tests.rules.consensus_oracle import kept_by

LONG = (*LENGTHS, 16_385, 70_000, 262_145)  # beyond the chunks that are worked on
GRAM = {torch.float64: 1e-13}  # of |row i||row j|; 1e-5 for the others
COMBINE = 1e-6  # of the weighted sum of the magnitudes, before the result is rounded once
FOLD, SQUARE = 1e-6, 1e-5  # of the fold of the magnitudes, and of the squared norm
RATIOS = st.sampled_from([None, 1.5, 10.0])
TAUS = st.sampled_from([0.0, 0.1, 0.5, 0.8, 1.0, 1.3, 2.0])


def finite(rows: Tensor) -> Tensor:
    return rows.isfinite().all(1)


@fuzzed(60)
@given(gradients(lengths=LONG))
def test_gram(drawn: Drawn) -> None:
    rows = drawn.rows
    found = gram(rows)
    clean = torch.where(finite(rows)[:, None], rows, 0).double()
    norms = clean.norm(dim=1)
    error = (found - clean @ clean.T).abs()
    both = finite(rows)[:, None] & finite(rows)
    assert found.dtype == torch.float64
    assert (error <= GRAM.get(rows.dtype, 1e-5) * norms[:, None] * norms)[both].all()
    assert not found[~both].isfinite().any()
    assert torch.equal(found.diagonal() > 0, rows.any(1) & ~found.diagonal().isnan())


@fuzzed(100)
@given(gradients(lengths=LONG), st.data())
def test_combine(drawn: Drawn, data: st.DataObject) -> None:
    rows = drawn.rows
    shares = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.3, 1e-3, -0.5])
    weights = torch.tensor(data.draw(st.lists(shares, min_size=len(rows), max_size=len(rows)))).double()
    weights = weights / max(len(rows), 1)
    dtype = data.draw(st.sampled_from(DTYPES)) if rows.dtype != torch.float64 else rows.dtype
    over = data.draw(st.sampled_from([None, *range(len(rows))]))
    counted = torch.where(weights[:, None] != 0, rows, 0).double()
    before = rows.clone()
    out = torch.empty(rows.shape[1], dtype=dtype) if over is None else rows[over]
    result = combine(rows, weights, out=out)
    assert result is out
    exact = (weights[:, None] * counted).sum(0)
    wide = out.dtype if out.dtype == torch.float64 else torch.float32
    magnitude = (weights[:, None] * counted).abs().sum(0)
    rounding = torch.finfo(out.dtype)
    limit = COMBINE * magnitude + rounding.eps * exact.abs() + rounding.smallest_normal * rounding.eps
    limit += len(rows) * torch.finfo(wide).smallest_normal * torch.finfo(wide).eps
    sound = exact.isfinite() & (exact.abs() < rounding.max / 2)
    assert ((result.double() - exact).abs() <= limit)[sound].all()
    assert not result[~counted.isfinite().all(0)].isfinite().any()
    kept_rows = [i for i in range(len(rows)) if i != over]
    assert torch.equal(rows[kept_rows].nan_to_num(7), before[kept_rows].nan_to_num(7))


@fuzzed(30)
@given(gradients(lengths=LONG), st.sampled_from([64, 100, 1000, 4096]), st.integers(0, 2**31), st.integers(0, 9))
def test_fold(drawn: Drawn, size: int, place: int, cuts: int) -> None:
    for x in drawn.rows[:2]:
        parts = [len(part) for part in torch.tensor_split(x, cuts + 1)]
        spans = folds.spans_of((place + 3 * i * len(x), count) for i, count in enumerate(parts))
        for way in (folds._fold_on_cpu, folds._fold_on_accelerator):
            folded, square = way(x, spans, size)
            assert (folded.dtype, square.dtype, folded.shape) == (torch.float32, torch.float64, (size,))
            if not x.isfinite().all():
                assert not square.isfinite()
                assert not folded.isfinite().all()
                continue
            expected, exact = reference(x, spans, size), x.double().square().sum()
            magnitude = torch.zeros(size, dtype=torch.float64)
            places = torch.cat([torch.arange(s.place, s.place + s.count) for s in spans] or [torch.zeros(0).long()])
            magnitude.index_add_(0, places % period_of(size), x.double().abs())
            smallest = len(x) * 1.5e-45
            assert ((folded.double() - expected).abs() <= FOLD * magnitude + smallest).all()
            torch.testing.assert_close(square, exact, rtol=SQUARE, atol=0)


def of_name(name: str, tau: float) -> tuple[Weighting, oracle.Rule]:
    if name == "mean":
        return Mean(), oracle.mean
    if name == "neighborhood":
        return NeighborhoodAgreement(tau), oracle.neighborhood(tau)
    running: Literal["mean", "half"] = "half" if name == "half" else "mean"
    return SequentialAgreement(tau, running=running), oracle.sequential(tau, running)


def exact_gramian(rows: Tensor) -> Tensor:
    """Return the Gramian `(W, W)` in float64, pair by pair: copies have the same bits, so that they tie."""
    wide = rows.double()
    return torch.stack([torch.stack([(u * v).sum() for v in wide]) for u in wide])


def assert_recorded(found: Agreement, rows: Tensor, ratio: float | None) -> None:
    """Every field but the rule's own is that of explicit vectors."""
    there = finite(rows)
    voters = oracle.present(list(rows.double()), ratio)
    norms = torch.where(there[:, None], rows, 0).double().norm(dim=1)
    assert found.voters.nonzero().flatten().tolist() == voters
    assert torch.equal(found.nonfinite, ~there)
    assert torch.equal(found.overlong, there & (norms > 0) & ~found.voters)
    assert torch.equal(found.kept, found.weights.nan_to_num(0) != 0)
    assert found.agreed == (found.kept.any() or not (voters or found.nonfinite.any()))
    units = torch.where(found.voters[:, None], rows, 0).double() / norms.clamp(min=1e-300)[:, None]
    torch.testing.assert_close(found.cosine, units @ units.T, rtol=0, atol=1e-4)


@fuzzed(120)
@given(gradients(), st.sampled_from(["mean", "neighborhood", "sequential", "half"]), TAUS, RATIOS)
def test_rules_by_cosines(drawn: Drawn, name: str, tau: float, ratio: float | None) -> None:
    rows = drawn.rows
    assume(clear_of_the_guard(rows, ratio))
    weighting, rule = of_name(name, tau)
    expected = unless_rounding_decides(lambda: oracle.filtered(list(rows), rule, ratio))
    found = decide(gram(rows), weighting, ratio)
    assert_recorded(found, rows, ratio)
    assert found.kept.nonzero().flatten().tolist() == expected.kept
    if expected.gradient.isnan().any():
        assert found.weights.isnan().all()
    else:
        kept = torch.where(found.kept[:, None], rows, 0).double()
        oracle.assert_close(found.weights @ kept, expected.gradient, 1e-9)


@fuzzed(80)
@given(gradients(), st.sampled_from([1.5, 3.0]), RATIOS)
def test_the_rule_without_a_threshold(drawn: Drawn, ratio: float, guard: float | None) -> None:
    rows = drawn.rows
    assume(clear_of_the_guard(rows, guard))
    voters = oracle.present(list(rows.double()), guard)
    expected = unless_rounding_decides(lambda: kept_by(list(rows.double()), voters, ratio)) if voters else []
    gramian = exact_gramian(rows)  # distances that are small beside the lengths need products in float64
    found = decide(gramian, ConsensusAgreement(ratio), guard)
    assert_recorded(found, rows, guard)
    assert found.kept.nonzero().flatten().tolist() == expected


@fuzzed(30)
@given(
    gradients(dtypes=(torch.float32, torch.float64)),
    TAUS,
    st.integers(0, 99),
    st.sampled_from([2.0**-40, 2.0**60]),
)
def test_properties(drawn: Drawn, tau: float, seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(drawn.rows), generator=generator)
    gramian, plain = gramian_of(drawn.rows), len(set(drawn.recipe.split("]")[0].split(","))) <= 2
    for weighting in (Mean(), NeighborhoodAgreement(tau), SequentialAgreement(tau), ConsensusAgreement()):
        assert_convex(weighting, gramian)
        assert_pure(weighting, gramian)
        assert_scale_invariant(weighting, gramian, factor)
        for entry in (0.0, torch.nan, torch.inf):
            assert_blind_to_absent(weighting, gramian, int(order[0]), entry)
        if plain and not isinstance(weighting, SequentialAgreement):  # copies tie, and rounding breaks ties
            assert_permutation_equivariant(weighting, gramian, order)


@fuzzed(80)
@given(st.integers(1, 20), st.integers(0, 2**16), st.sampled_from([torch.float32, torch.float64]), TAUS, RATIOS)
def test_matrices_that_are_no_gramians(
    world_size: int, seed: int, dtype: torch.dtype, tau: float, ratio: float | None
) -> None:
    """Rounding, a bad GPU: whatever the numbers are, the weights are shares."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 20, (world_size, world_size), generator=generator)
    matrix = torch.randn(world_size, world_size, generator=generator) * 10.0**exponents
    odd = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf])[torch.randint(4, matrix.shape, generator=generator)]
    matrix = torch.where(torch.rand(matrix.shape, generator=generator) < 0.1, odd, matrix).to(dtype)
    for name in ("mean", "neighborhood", "sequential", "half"):
        found = decide(matrix, of_name(name, tau)[0], ratio)
        total = found.weights.sum().item()
        assert found.weights.isnan().all() or total == 0 or abs(total - 1) < 1e-5
        assert not found.kept[~found.voters].any()


def test_every_field_is_judged() -> None:
    """A new field of the record must come into `assert_recorded`."""
    names = {field.name for field in fields(Agreement)}
    names -= {"distance", "flipped", "equal", "trusted", "condemned", "finished"}  # of ballots
    assert names == {"gramian", "cosine", "weights", "kept", "agreed", "voters", "nonfinite", "overlong"}
