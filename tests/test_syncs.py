"""The counter that other tests rely on counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.syncs import HostSyncs


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.tolist,
        Tensor.nonzero,
        Tensor.cpu,
        torch.nonzero,
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: [1, 2][x[0]],
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.index_put_((x > 0,), torch.tensor(0)),
        lambda x: x.masked_select(x > 0),
        lambda x: 0 if x.any() else 1,
        repr,
    ],
)
def test_whatever_waits_is_counted_once(wait: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1, 0, 3])
    with HostSyncs() as syncs:
        wait(x)
    assert len(syncs.calls) == 1, syncs.calls


def test_arithmetic_does_not_wait() -> None:
    x = torch.tensor([1.0, 0.0, 3.0])
    with HostSyncs() as syncs:
        torch.where(x > 0, x, 0).sum().clamp(min=1).view(1)
        x.index_select(0, x.argmax().view(1))
    assert syncs.calls == []
