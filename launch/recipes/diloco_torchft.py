"""Train with torchft's DiLoCo (arXiv 2311.08105), filtered: workers die and come back.

torchrun --nproc-per-node 4 launch/recipes/diloco_torchft.py --turned 1      (each rank is a worker, on CPUs)
"""

import argparse
import os

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft import Manager
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

from gaf_ddp.torchft import FilteredGroup


def main() -> None:
    """Train a small network; the loss of one worker may be turned, as a fault would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="outer ones, of ten inner ones each")
    parser.add_argument("--turned", type=int, default=-1, help="a worker whose loss is negated")
    arguments = parser.parse_args()
    rank, everyone = int(os.environ["RANK"]), TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:  # in earnest it lives apart from the workers, and waits for fewer of them
        lighthouse = LighthouseServer(bind="[::]:0", min_replicas=int(os.environ["WORLD_SIZE"]))
        everyone.set("lighthouse", lighthouse.address())
    os.environ["TORCHFT_LIGHTHOUSE"] = everyone.get("lighthouse").decode()
    own = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"replica_id": str(rank), "rank": 0, "world_size": 1, "store_addr": "localhost", "store_port": own.port}

    torch.manual_seed(0)
    rule, model = torch.randn(20, 4), nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    inner = torch.optim.AdamW(model.parameters(), lr=0.003)
    group = FilteredGroup(momentum=0.9)  # there are few rounds
    manager = Manager(group, None, None, min_replica_size=3, use_async_quorum=False, init_sync=False, **place)
    for name, part in (("model", model), ("inner", inner)):  # who comes back is given these
        manager.register_state_dict_fn(name, part.load_state_dict, part.state_dict)

    torch.manual_seed(rank + 1)  # from here on workers draw data of their own
    with DiLoCo(manager, [model], inner, outer, sync_every=10, use_bucketization=True):
        while manager.current_step() < arguments.steps:
            inputs = torch.randn(32, 20)
            loss = nn.functional.cross_entropy(model(inputs), (inputs @ rule).argmax(1))
            inner.zero_grad()
            (-loss if rank == arguments.turned else loss).backward()
            inner.step()  # each tenth one is a quorum, and an outer step

    kept = {name[-2:]: f"{share:.2f}" for name, share in group.state.summary().items() if "kept_rank" in name}
    if rank == 0:
        print(f"loss {loss.item():.3f}, kept {kept}")
    manager.shutdown()
    group.shutdown()


if __name__ == "__main__":
    main()
