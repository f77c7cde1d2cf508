"""filter_parameters in torchft's DDP, whose manager averages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engines.engines import assert_filtered
from tests.frameworks.by_hand import QUIET
from tests.frameworks.engines import quiet, torchft_ddp

pytest.importorskip("torchft", reason="torchft is not installed")

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def body(device: torch.device) -> None:
    quiet()
    assert_filtered(torchft_ddp)


def test_a_turned_rank_is_left_out(gloo_ranks: Callable[..., list[Any]]) -> None:
    gloo_ranks(4, body)
