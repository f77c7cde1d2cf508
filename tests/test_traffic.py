"""Bytes on the wire between hosts, relative to DDP's plain all-reduce of the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gaf_ddp import GAFState, gaf_hook
from tests.nets import Probe, ddp
from tools.hosts import Hosts, bytes_sent, why_no_hosts

pytestmark = [pytest.mark.ranks, pytest.mark.job]
WARM_UP, STEPS = 2, 2  # connections are made, and DDP makes its buckets anew, in the steps before
SIZES = [262_144] * 10  # 10 MB
SETTINGS: dict[str, dict[str, Any] | None] = {
    "all-reduce": None,
    "sketch": {},
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
                dist.barrier()  # another rank of this host must not send before
            model(gradient).backward()
        dist.barrier()
        sent[name] = bytes_sent() - before
    return sent


def leaving(hosts: int, ranks: int) -> float:
    """Return what leaves hosts of so many ranks in an all-to-all and a ring's all-gather, relative to a ring's both."""
    return (1 + ranks**2 * (hosts - 1) / (hosts * ranks - 1)) / 2


@pytest.fixture(scope="module", params=[(4, 1), (2, 2)], ids=["4 hosts", "2 hosts of 2 ranks"])
def sent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return what all hosts sent, by setting, relative to an all-reduce; of exact exchanges, to `leaving`."""
    count, ranks = request.param
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("hosts")
    with Hosts(count) as hosts:
        counts = hosts.run(count_bytes, folder=folder, ranks_per_host=ranks)[::ranks]
    assert not any(Path("/run/netns", name).exists() for name in hosts.names), "namespaces were left behind"
    total = {name: sum(counted[name] for counted in counts) for name in SETTINGS}
    # What a ring must send at least; its acknowledgements and headers come on top.
    world = count * ranks
    assert total["all-reduce"] >= STEPS * count * 2 * (world - 1) / world * sum(SIZES) * 4
    expected = {name: 1.0 if name in ("all-reduce", "sketch") else leaving(count, ranks) for name in SETTINGS}
    return {name: all_ / total["all-reduce"] / expected[name] for name, all_ in total.items()}


def test_sketches_leave_the_gradients_to_the_all_reduce(sent: dict[str, float]) -> None:
    assert 1 < sent["sketch"] <= 1.02


@pytest.mark.parametrize("scope", ["bucket", "model"])
def test_sends_the_bytes_of_an_all_reduce_or_what_must_leave_a_host(sent: dict[str, float], scope: str) -> None:
    assert sent[scope] <= 1.01


@pytest.mark.parametrize("scope", ["bucket", "model"])
def test_sends_half_the_bytes_in_bfloat16(sent: dict[str, float], scope: str) -> None:
    assert sent[f"{scope} bfloat16"] <= 0.52
