"""Ranks whose settings differ are told so at the first bucket, all of them and at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, Mean, NeighborhoodAgreement, Weighting, gaf_hook
from tests.nets import Probe, ddp

Ranks = Callable[..., list[Any]]

W = 3


class Odd(Weighting):
    """A user's rule, whose `repr` holds an address, another one on every rank."""

    def __call__(self, gramian: Tensor) -> Tensor:
        return torch.full_like(gramian[0], 1 / len(gramian))

    __repr__ = object.__repr__


def constant(step: int) -> float:
    return 1.0


def backwards(device: torch.device, usual: dict[str, Any], unusual: dict[str, Any], step: int) -> list[str]:
    """Return how two models' first backwards end where rank 1's settings, or its step, differ."""
    mine = dist.get_rank() == 1
    state = GAFState(**(unusual if mine else usual))
    state.step = step if mine else 0
    ends = []
    for _ in range(2):
        model = ddp(Probe([40]), device)
        model.register_comm_hook(state, gaf_hook)
        try:
            model(torch.ones(40, device=device)).backward()
            ends.append("nothing")
        except ValueError as error:
            ends.append(str(error))
    return ends


@pytest.mark.parametrize(
    ("usual", "unusual", "found"),
    [
        ({}, {"tau": 0.5}, "tau must be the same on every rank, found 1.0 on rank 0 and 0.5 on rank 1"),
        (
            {},
            {"tau": constant},
            "tau must be the same on every rank, found 1.0 on rank 0 and a schedule on rank 1",
        ),
        ({}, {"scope": "model"}, "scope must be the same on every rank, found 'bucket' on rank 0 and 'model'"),
        (
            {},
            {"exchange": "gather"},
            "exchange must be the same on every rank, found 'auto' on rank 0 and 'gather'",
        ),
        ({}, {"wire_dtype": torch.float16}, "wire_dtype must be the same on every rank, found None on rank 0"),
        ({}, {"weighting": Mean()}, "weighting must be the same on every rank, found NoneType on rank 0 and Mean"),
        (
            {"weighting": NeighborhoodAgreement(0.9)},
            {"weighting": NeighborhoodAgreement(0.8)},
            "weighting must be the same on every rank, found NeighborhoodAgreement",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unlike_settings_are_refused_on_every_rank(
    ranks: Ranks, usual: dict[str, Any], unusual: dict[str, Any], found: str
) -> None:
    for ends in ranks(W, backwards, usual, unusual, 0, group_timeout=20.0):
        assert all(end.startswith(found) for end in ends), ends


def test_a_checkpoint_loaded_on_one_rank_is_noticed(ranks: Ranks) -> None:
    for ends in ranks(W, backwards, {}, {}, 7, group_timeout=20.0):
        assert ends == ["step must be the same on every rank, found 0 on rank 0 and 7 on rank 1"] * 2


@pytest.mark.parametrize("settings", [{"tau": constant}, {"weighting": Odd()}], ids=["schedule", "weighting"])
def test_what_cannot_be_compared_is_no_difference(ranks: Ranks, settings: dict[str, Any]) -> None:
    for ends in ranks(W, backwards, settings, settings, 0):
        assert ends == ["nothing", "nothing"]
