"""Bytes on the wire between four hosts, relative to DDP's plain all-reduce of the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gaf_ddp import GAFState, gaf_hook
from tests.nets import Probe, ddp
from tools.hosts import Hosts, bytes_sent, why_no_hosts

W, WARM_UP, STEPS = 4, 2, 2  # connections are made, and DDP makes its buckets anew, in the steps before
SIZES = [262_144] * 10  # 10 MB
SETTINGS: dict[str, dict[str, Any] | None] = {
    "all-reduce": None,
    "bucket": {"tau": 1.0},
    "model": {"tau": 1.0, "scope": "model"},
    "bucket bfloat16": {"tau": 1.0, "wire_dtype": torch.bfloat16},
    "model bfloat16": {"tau": 1.0, "scope": "model", "wire_dtype": torch.bfloat16},
}


def count_bytes() -> dict[str, int]:
    """Return what this rank sent in STEPS steps, by setting."""
    gradient = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(dist.get_rank()))
    sent = {}
    for name, settings in SETTINGS.items():
        model = ddp(Probe(SIZES), torch.device("cpu"), bucket_cap_mb=4)
        if settings is not None:
            model.register_comm_hook(GAFState(**settings), gaf_hook)
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                dist.barrier()
                before = bytes_sent()
            model(gradient).backward()
        dist.barrier()
        sent[name] = bytes_sent() - before
    return sent


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return what all ranks sent, by setting, in units of the plain all-reduce."""
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("hosts")
    with Hosts(W) as hosts:
        counts = hosts.run(count_bytes, folder=folder)
    assert not any(Path("/run/netns", name).exists() for name in hosts.names), "namespaces were left behind"
    total = {name: sum(count[name] for count in counts) for name in SETTINGS}
    # What an all-reduce must send at least; its acknowledgements and headers come on top.
    assert total["all-reduce"] >= STEPS * 2 * (W - 1) * sum(SIZES) * 4
    return {name: count / total["all-reduce"] for name, count in total.items()}


@pytest.mark.parametrize("scope", ["bucket", "model"])
def test_sends_the_bytes_of_an_all_reduce(sent: dict[str, float], scope: str) -> None:
    assert sent[scope] <= 1.01


@pytest.mark.parametrize("scope", ["bucket", "model"])
def test_sends_half_the_bytes_in_bfloat16(sent: dict[str, float], scope: str) -> None:
    assert sent[f"{scope} bfloat16"] <= 0.52
