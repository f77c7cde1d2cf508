"""filter_parameters in torchft's DDP, whose manager averages, and FilteredGroup by itself."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.engines.engines import assert_filtered
from tests.frameworks.by_hand import QUIET
from tests.frameworks.engines import quiet, torchft_ddp

pytest.importorskip("torchft", reason="torchft is not installed")

from torchft.process_group import reconfigure_with_store

from gaf_ddp.torchft import FilteredGroup

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def body(device: torch.device) -> None:
    quiet()
    assert_filtered(torchft_ddp)


def quorums(device: torch.device, port: int) -> None:
    """Groups of their own for each quorum; what is summed up is filtered where there are no parameters."""
    quiet()
    rank = dist.get_rank()
    with pytest.raises(ValueError, match=r"the default group is made for each quorum"):
        FilteredGroup()
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"momentum must be"):
        FilteredGroup(momentum=2.0)
    group = FilteredGroup(timeout=timedelta(seconds=20), momentum=0.5)
    states = []
    for quorum, size in enumerate((3, 3)):
        reconfigure_with_store(group, f"localhost:{port}/{quorum}", rank, size)
        assert dist.get_world_size() == group.size() == size
        states.append(group.state)
        for round_ in range(8):
            agreed = torch.randn(500, generator=torch.Generator().manual_seed(round_))
            own = agreed + 0.1 * torch.randn(500, generator=torch.Generator().manual_seed(10 * round_ + rank))
            vector = -own if rank == 1 else own
            group.allreduce([vector], None).wait()
        assert torch.nn.functional.cosine_similarity(vector, agreed, dim=0) > 0.9
        assert vector.norm() / agreed.norm() > 2.5  # a sum of three
        found = states[-1].agreement
        assert found is not None
        assert found.kept.tolist() == [True, False, True]
        assert states[-1].momentum == 0.5
    assert states[0] is not states[1]
    group.shutdown()
    assert not dist.is_initialized()


def test_each_quorum_votes_anew(gloo_ranks: Callable[..., list[Any]]) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    gloo_ranks(3, quorums, store.port)


def test_a_turned_rank_is_left_out(gloo_ranks: Callable[..., list[Any]]) -> None:
    gloo_ranks(4, body)
