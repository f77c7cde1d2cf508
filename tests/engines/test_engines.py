"""filter_parameters in the engines that torch has: one of four ranks is turned, and left out."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.engines import torch_engines as engines
from tests.engines.engines import Engine, assert_filtered
from tests.marks import job_but

Ranks = Callable[..., list[Any]]

# What each is, and how near it comes to SGD in float32.
ENGINES: dict[str, tuple[Callable[[], Engine], float | None]] = {
    "ddp": (partial(engines.beside, "none"), 1e-5),
    "allreduce_hook": (partial(engines.beside, "allreduce"), 1e-5),
    "bf16_compress_hook": (partial(engines.beside, "bf16_compress"), 2e-2),
    "powerSGD_hook": (partial(engines.beside, "powersgd"), None),
    "fsdp1": (partial(engines.fsdp1, False), 1e-5),
    "fsdp1, use_orig_params": (partial(engines.fsdp1, True), 1e-5),
    "replicate": (engines.replicated, 1e-5),
    "main_grad": (engines.megatron, 1e-5),
}


def run(device: torch.device, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of FSDP1 and replicate
        warnings.filterwarnings("error", module="gaf_ddp")
        make, to = ENGINES[name]
        assert_filtered(make, to=to)


@pytest.mark.parametrize("name", job_but("ddp", of=ENGINES))
def test_a_turned_rank_is_left_out(gloo_ranks: Ranks, name: str) -> None:
    gloo_ranks(4, run, name)
