"""filter_parameters in DeepSpeed's ZeRO, on the CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.engines.engines import assert_filtered
from tests.frameworks.by_hand import QUIET
from tests.frameworks.engines import deepspeed_engine, quiet

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def body(device: torch.device, stage: int) -> None:
    quiet()
    assert_filtered(partial(deepspeed_engine, stage))


@pytest.mark.parametrize("stage", range(4))
def test_a_turned_rank_is_left_out(gloo_ranks: Callable[..., list[Any]], stage: int) -> None:
    gloo_ranks(4, body, stage)
