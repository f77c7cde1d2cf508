"""A replica of torchft for tests: `python -m tests.frameworks.replicas REPLICA LIGHTHOUSE FILE`, until it is killed."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft import DistributedDataParallel, Manager, Optimizer

from gaf_ddp.torchft import FilteredGroup
from tests.engines.engines import batch
from tests.nets import mlp

TURNED = 1
SECONDS = timedelta(seconds=5)


def train(replica: int, lighthouse: str, file: Path) -> None:
    """Train for ever; write a line after each step."""
    torch.set_num_threads(1)
    network = mlp()
    inner = torch.optim.SGD(network.parameters(), lr=0.002, momentum=0.9)
    group = FilteredGroup(network.parameters(), timeout=SECONDS)
    own = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"replica_id": str(replica), "rank": 0, "world_size": 1, "store_addr": "localhost", "store_port": own.port}
    told = {"min_replica_size": 3, "use_async_quorum": False, "timeout": SECONDS, "quorum_timeout": SECONDS * 6}
    manager = Manager(group, None, None, lighthouse_addr=lighthouse, **told, **place)
    for name, part in (("network", network), ("optimizer", inner)):
        manager.register_state_dict_fn(name, part.load_state_dict, part.state_dict)
    model, optimizer = DistributedDataParallel(manager, network), Optimizer(manager, inner)
    with file.open("w", buffering=1) as lines:
        while True:
            optimizer.zero_grad()
            step, kept, error = manager.current_step(), None, None
            inputs, labels = batch(replica, step)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            try:
                (-loss if replica == TURNED else loss).backward()
                kept = group.state.agreement  # of the step before
                group.state.advance()
            except RuntimeError as found:
                manager.report_error(found)
                error = str(found)
            optimizer.step()
            line = {
                "step": step,
                "committed": manager.current_step() > step,
                "replicas": manager.num_participants(),
                "kept": None if kept is None else kept.kept.tolist(),
                "loss": loss.item(),
                "sum": sum(each.double().sum().item() for each in network.parameters()),
                "error": error,
            }
            print(json.dumps(line), file=lines)


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
