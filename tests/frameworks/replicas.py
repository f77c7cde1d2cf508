"""A replica of torchft for tests: `python -m tests.frameworks.replicas WAY REPLICA LIGHTHOUSE FILE [STEP]`.

It trains until it is killed, and writes a line after each step. With a step it kills itself there, in the midst of a
quorum, and owes a ballot by then. The ways are torchft's `ddp` and its `diloco`, whose steps are outer ones.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft import DistributedDataParallel, Manager, Optimizer
from torchft.local_sgd import DiLoCo

from gaf_ddp import GAFState
from gaf_ddp.torchft import FilteredGroup
from tests.engines.engines import batch
from tests.nets import mlp

TURNED = 1
SECONDS = timedelta(seconds=5)
INNER = 10  # steps of DiLoCo between two outer ones

Write = Callable[..., None]


def managed(group: FilteredGroup, replica: int, lighthouse: str, **parts: Any) -> Any:
    """Return a manager of a group, which gives the parts to who comes back."""
    own = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        group,
        None,
        None,
        min_replica_size=3,
        use_async_quorum=False,
        timeout=SECONDS,
        quorum_timeout=SECONDS * 6,
        init_sync=False,  # all begin with the same network
        replica_id=str(replica),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=own.port,
        lighthouse_addr=lighthouse,
    )
    for name, part in parts.items():
        manager.register_state_dict_fn(name, part.load_state_dict, part.state_dict)
    return manager


def loss_of(model: Any, replica: int, step: int) -> Tensor:
    """Return a replica's loss, which may be turned."""
    inputs, labels = batch(replica, step)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    return -loss if replica == TURNED else loss


def ddp(replica: int, lighthouse: str, write: Write, dies: int | None) -> None:
    """Train with torchft's DistributedDataParallel."""
    network = mlp()
    inner = torch.optim.SGD(network.parameters(), lr=0.002, momentum=0.9)
    group = FilteredGroup(network.parameters(), timeout=SECONDS)
    manager = managed(group, replica, lighthouse, network=network, optimizer=inner)
    model, optimizer = DistributedDataParallel(manager, network), Optimizer(manager, inner)
    while True:
        optimizer.zero_grad()
        step, error = manager.current_step(), None
        if step == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        state = group.state
        try:
            loss_of(model, replica, step).backward()
            if dies is None or step != dies - 1:
                state.advance()
        except RuntimeError as found:
            manager.report_error(found)
            error = str(found)
        optimizer.step()
        write(manager, network, state, step, error)


def diloco(replica: int, lighthouse: str, write: Write, dies: int | None) -> None:
    """Train with torchft's DiLoCo."""
    assert dies is None
    network = mlp()
    inner = torch.optim.SGD(network.parameters(), lr=0.003)
    outer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.5, nesterov=True)
    group = FilteredGroup(timeout=SECONDS, momentum=0.9)
    manager = managed(group, replica, lighthouse, network=network, inner=inner)
    with DiLoCo(manager, [network], inner, outer, sync_every=INNER, use_bucketization=True):
        while True:
            before = manager.current_step()
            for number in range(INNER):
                inner.zero_grad()
                loss_of(network, replica, INNER * before + number).backward()
                inner.step()
            committed = manager.current_step() > before
            write(manager, network, group.state, manager.current_step() - committed, None, committed)


def main(way: str, replica: str, lighthouse: str, file: str, dies: str | None = None) -> None:
    """Train for ever."""
    torch.set_num_threads(1)
    with Path(file).open("w", buffering=1) as lines:

        def write(
            manager: Any,
            network: nn.Module,
            state: GAFState,
            step: int,
            error: str | None,
            committed: bool | None = None,
        ) -> None:
            last = state._records.decisions  # without waiting, as nobody would here
            line = {
                "step": step,
                "time": time.time(),
                "committed": manager.current_step() > step if committed is None else committed,
                "replicas": manager.num_participants(),
                "kept": last[0].agreement.kept.tolist() if last else None,
                "sum": sum(each.double().sum().item() for each in network.parameters()),
                "error": error,
            }
            print(json.dumps(line), file=lines)

        train = {"ddp": ddp, "diloco": diloco}[way]
        train(int(replica), lighthouse, write, None if dies is None else int(dies))


if __name__ == "__main__":
    main(*sys.argv[1:])
