"""CPU memory used again: what is lent is nobody else's, what came back is used again."""

import pytest
import torch

from gaf_ddp.exchange.workspace import Workspace


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(3, 1001), (1, 16), (2, 1), (0, 5), (4, 0)])
def test_rows_begin_cache_lines_and_share_nothing(rows: int, columns: int, dtype: torch.dtype) -> None:
    workspace = Workspace()
    lent = [workspace.take(rows, columns, dtype) for _ in range(2)]
    for i, matrix in enumerate(lent):
        assert matrix.shape == (rows, columns)
        assert matrix.dtype == dtype
        for j, row in enumerate(matrix):
            assert row.is_contiguous()
            assert not columns or row.data_ptr() % 64 == 0
            row.fill_(i * rows + j)
    for i, matrix in enumerate(lent):
        for j, row in enumerate(matrix):
            assert (row == i * rows + j).all()


def test_what_came_back_is_used_again_also_for_less() -> None:
    workspace = Workspace()
    first, second = workspace.take(2, 1000, torch.float32), workspace.take(2, 1000, torch.float32)
    address = second.data_ptr()
    workspace.give_back(second[1])  # any part
    assert workspace.take(3, 500, torch.float32).data_ptr() == address
    assert workspace.take(3, 500, torch.float32).data_ptr() not in (address, first.data_ptr())


def test_memory_too_small_is_replaced_not_kept() -> None:
    """What came back is at most one memory here, the largest: the smaller ones before it are gone."""
    workspace = Workspace()
    for columns in (100, 200, 400):
        workspace.give_back(workspace.take(1, columns, torch.float32))
    largest = workspace.take(1, 400, torch.float32)
    address = largest.data_ptr()
    workspace.give_back(largest)
    lent = [workspace.take(1, 1, torch.float32) for _ in range(2)]
    assert [matrix.data_ptr() == address for matrix in lent] == [True, False]
    assert lent[1].untyped_storage().nbytes() == 64  # fresh


def test_the_smallest_that_holds_it_is_taken() -> None:
    workspace = Workspace()
    lent = [workspace.take(1, columns, torch.float32) for columns in (400, 100, 200)]
    address = {columns: matrix.data_ptr() for columns, matrix in zip((400, 100, 200), lent, strict=True)}
    for matrix in lent:
        workspace.give_back(matrix)
    assert [workspace.take(1, n, torch.float32).data_ptr() for n in (150, 90, 50)] == [
        address[200],
        address[100],
        address[400],
    ]


def test_what_is_not_lent_may_be_given_back() -> None:
    workspace = Workspace()
    workspace.give_back(torch.ones(1000))
    workspace.give_back(workspace.take(0, 10, torch.float32))
    part = workspace.take(2, 10, torch.float32)
    workspace.give_back(part)
    workspace.give_back(part)  # twice is once
    first, second = workspace.take(2, 10, torch.float32), workspace.take(2, 10, torch.float32)
    assert first.data_ptr() != second.data_ptr()
