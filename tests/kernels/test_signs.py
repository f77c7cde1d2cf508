"""Places of elements and their signs: balanced, and others for every element and block."""

import pytest
import torch

from gaf_ddp.kernels.fold import Span, fold, spans_of, whole
from gaf_ddp.kernels.signs import block_length, both_signs, period_of, sign_table, signs_at

CPU = torch.device("cpu")


def test_signs_are_balanced_and_differ_by_element_and_block() -> None:
    length = block_length(4096)
    signs = signs_at(torch.arange(6 * length), 4096).double()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.sum().item()) < 5 * len(signs) ** 0.5
    blocks = signs.view(6, length)
    assert ((blocks @ blocks.T).fill_diagonal_(0).abs() < 5 * length**0.5).all()
    for lag in (1, 2, 8, 64, 1024, period_of(4096)):
        assert abs((signs[:-lag] @ signs[lag:]).item()) < 5 * len(signs) ** 0.5


@pytest.mark.parametrize("size", [64, 4096])
def test_signs_of_blocks_of_a_large_model_are_balanced(size: int) -> None:
    """The blocks' own signs, and where in the table they begin: of the first and of the last places there are."""
    length = block_length(size)
    for first in (0, 2**47 - 10_000 * length):
        signs = signs_at(first + length * torch.arange(10_000), size).double()
        assert abs(signs.sum().item()) < 5 * 100
        assert abs((signs[1:] @ signs[:-1]).item()) < 5 * 100


def test_a_place_has_the_same_sign_whatever_is_asked_beside_it() -> None:
    places = torch.tensor([2**47 - 1, 0, 5 * block_length(100), 2**40, 1])
    together = signs_at(places, 100)
    assert together.dtype == torch.int8
    assert together.tolist() == [signs_at(place[None], 100).item() for place in places]


def test_rows_of_the_other_sign_are_behind_the_table() -> None:
    table, both = sign_table(100, torch.int8, CPU), both_signs(100, CPU)
    assert len(table) == 4 * block_length(100)
    assert torch.equal(both, torch.cat([table, -table]))


@pytest.mark.parametrize(("size", "period"), [(64, 61), (100, 97), (101, 101), (1024, 1021), (4096, 4093)])
def test_the_period_is_a_prime_and_blocks_are_whole_rows(size: int, period: int) -> None:
    assert period_of(size) == period
    assert block_length(size) % period == 0
    assert 2**17 - period < block_length(size) <= 2**17
    assert block_length(2**18) == period_of(2**18) == 262_139


def test_the_sketch_is_pinned() -> None:
    """What saved momenta of sketches depend on."""
    found, square = fold(torch.arange(300_000) % 7 + 1.0, whole(300_000), 64)
    assert found[:6].tolist() == [-382, 260, 126, 110, -429, 781]
    assert square == pytest.approx(5_999_981, rel=1e-6)
    found, _ = fold(torch.arange(1000) % 7 + 1.0, (Span(0, 2**40, 1000),), 64)
    assert found[:6].tolist() == [4, 9, 9, -26, 16, 8]


def test_spans_merge_neighbours() -> None:
    assert spans_of([(5, 2), (7, 3), (0, 5), (20, 0), (5, 1)]) == (Span(0, 5, 5), Span(5, 0, 6))
    assert spans_of([]) == spans_of([(3, 0)]) == ()
