"""Ranks that run out of inputs, in DDP's Join: they have finished, and nobody calls them zero, absent or broken."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join

from gaf_ddp import AgreementLog, GAFState, gaf_hook
from gaf_ddp.monitor.log_reader import read
from gaf_ddp.monitor.log_sentences import sentences
from tests.nets import Probe, assert_replicas_equal, ddp

Ranks = Callable[..., list[Any]]


def join(device: torch.device, settings: dict[str, Any], log: Path) -> dict[str, Any]:
    """Train on rank 1 for twice as many steps as on the others; return what is told."""
    rank = dist.get_rank()
    model, state = ddp(Probe([50, 50]), device, bucket_cap_mb=0.0001), GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    written = AgreementLog(state, log / f"{rank}", every=6, rank=None)
    generator = torch.Generator().manual_seed(rank)
    with Join([model]):
        for _ in range(24 if rank == 1 else 12):
            optimizer.zero_grad()
            model(1 + 0.3 * torch.randn(100, generator=generator).to(device)).backward()
            optimizer.step()
            written.step()
    assert_replicas_equal(model)
    return {"report": state.report(), "summary": state.summary()}


@pytest.mark.parametrize("settings", [{}, {"tau": 1.0}, {"tau": 1.0, "scope": "model"}], ids=str)
def test_finished_ranks_are_neither_zero_nor_absent(
    gloo_ranks: Ranks, settings: dict[str, Any], tmp_path: Path
) -> None:
    for found in gloo_ranks(3, join, settings, tmp_path):
        report, summary = found["report"], found["summary"]
        assert [(each.kept, each.zero, each.first_out) for each in report.ranks] == [(1.0, 0, None)] * 3
        assert [bool(each.finished) for each in report.ranks] == [True, False, True]
        assert str(report).endswith(" ranks: all are kept")
        assert {summary[f"gaf/kept_rank_{rank:02d}"] for rank in range(3)} == {1.0}
        assert (summary["gaf/kept_fraction"], summary["gaf/zero_fraction"]) == (1, 0)
    assert sentences(read(tmp_path / "1"))[:3] == [
        "No rank is out at step 24: all are kept.",
        *(f"Rank {rank} on {socket.gethostname()} has finished: it is out of inputs." for rank in (0, 2)),
    ]
