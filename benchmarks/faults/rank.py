"""One rank of a job in which something breaks: it trains, and reports how that ended."""

import ctypes
import hashlib
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.faults.breaking import Breaking
from benchmarks.faults.declare import GROUP_TIMEOUT, SETUPS, STEPS, VICTIM, WORLD_SIZE, Fault
from gaf_ddp import GAFState, gaf_hook

_WIDTH, _LAYERS = 64, 5
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


class Net(nn.Module):
    """Layers in several buckets; breaking is told as backward passes."""

    def __init__(self, breaking: Breaking, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(_LAYERS))
        self.width, self._breaking = width, breaking

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == _LAYERS // 2:
                self._tell(x, "middle")
        self._tell(x, "begin")
        return x

    def _tell(self, x: Tensor, where: str) -> None:
        x.register_hook(lambda gradient: self._breaking.at(where))


def train(setup: str, fault: Fault, rank: int, folder: Path, host: tuple[str, str] | None) -> None:
    """Be one rank, and leave a report in the folder unless something kills it."""
    report: dict[str, Any] = {"hashes": {}, "errors": []}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    breaking = Breaking(fault, rank, folder / "noted", host)
    try:
        group = _join(rank, folder, host)
        _steps(setup, fault, rank, breaking, group, report)
    except BaseException as error:
        report["errors"].append(_told(error))
    report["ended"] = time.monotonic()
    written = folder / f"rank-{rank}.tmp"
    written.write_text(json.dumps(report))
    written.rename(folder / f"rank-{rank}.json")


def _join(rank: int, folder: Path, host: tuple[str, str] | None) -> Any:
    os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "0"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if host is None else "eth0"
    if host is not None:
        with open(f"/run/netns/{host[0]}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter the host {host[0]}")
    long = timedelta(seconds=60)  # busy machines start slowly
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=long)
    return dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT))


def _steps(setup: str, fault: Fault, rank: int, breaking: Breaking, group: Any, report: dict[str, Any]) -> None:
    net = Net(breaking, 720 if fault.what == "slow" else _WIDTH)  # 10 MB
    cap = 0.5 if fault.what == "slow" else 0.02
    model = DistributedDataParallel(net, process_group=group, bucket_cap_mb=cap)
    if SETUPS[setup] is not None and not (fault.what == "no hook" and rank == VICTIM):
        model.register_comm_hook(_state(setup, fault, rank, breaking, group), gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(STEPS + 1, net.width, generator=torch.Generator().manual_seed(rank))
    steps = STEPS + (rank == VICTIM) * {"step less": -1, "step more": 1}.get(fault.what, 0)
    if fault.what == "no hook":
        breaking.note()
    for step in range(steps):
        breaking.step = step
        if step >= STEPS - 1 and fault.what.startswith("step"):
            breaking.note()
        optimizer.zero_grad()
        try:
            model(_loaded(data, step) if fault.what == "loader" else data[step : step + 1]).sum().backward()
        except RuntimeError as error:
            if "the user's own error" not in str(error):
                raise
            report["errors"].append({**_told(error), "caught": True})
            continue
        breaking.at("end")
        optimizer.step()
        report["hashes"][step] = _hash(model)
    report["finished"] = True


def _loaded(data: Tensor, step: int) -> Tensor:
    """Return a step's input as processes read it that are forked amid training."""
    loader = DataLoader(TensorDataset(data[step : step + 1]), num_workers=2, multiprocessing_context="fork")
    ((x,),) = loader
    return torch.as_tensor(x)


def _state(setup: str, fault: Fault, rank: int, breaking: Breaking, group: Any) -> GAFState:
    settings = dict(SETUPS[setup] or {})
    if fault.what.startswith("weighting"):
        settings = {**settings, "tau": None, "weighting": _failing(fault, breaking)}
    return GAFState(group, **settings)


def _failing(fault: Fault, breaking: Breaking) -> Any:
    def weighting_that_fails(gramian: Tensor) -> Tensor:
        fine = torch.full((len(gramian),), 1 / len(gramian))
        if not breaking.is_now:
            return fine
        breaking.note()
        if fault.what == "weighting raises":
            raise LookupError("no weights today")
        other = {"weighting is nan": torch.nan, "weighting is negative": -0.5}.get(fault.what, 0.5)
        return fine * 0 + other

    return weighting_that_fails


def _hash(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _told(error: BaseException) -> dict[str, Any]:
    lines = str(error).strip().splitlines() or [""]
    return {"kind": type(error).__name__, "text": lines[0], "at": time.monotonic(), "caught": False}
