"""filter_parameters where a rank is lost, and groups that none of it can take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gaf_ddp import GAFState, filter_average, filter_parameters
from tests.nets import mlp

Ranks = Callable[..., list[Any]]


def lost(device: torch.device) -> None:
    """A rank goes without its ballot: what the other undoes is undone, though it raises."""
    model, state = mlp(), GAFState()
    undo = filter_parameters(model.parameters(), state)
    model(torch.randn(4, 12)).sum().backward()
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        return
    state.advance()
    with pytest.raises(RuntimeError, match=r"gaf_ddp: step 0"):
        undo()
    with pytest.raises(RuntimeError, match=r"advance\(\) is for filter_parameters"):
        state.advance()
    model(torch.randn(4, 12)).sum().backward()


def test_is_undone_where_a_rank_is_lost(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, lost)


def test_refuses_a_group_that_torch_does_not_know() -> None:
    for call in (
        lambda: filter_parameters(mlp().parameters(), GAFState(), dist.ProcessGroup(0, 1)),
        lambda: filter_average([torch.ones(3)], GAFState(dist.ProcessGroup(0, 1))),
    ):
        with pytest.raises(ValueError, match=r"process_group must be one of torch.distributed"):
            call()
