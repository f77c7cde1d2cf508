"""Train under fully_shard (FSDP2) beside tensor parallelism, filtered: a replica of two ranks has one vote.

torchrun --nproc-per-node 8 launch/recipes/fsdp_tensor_parallel.py --turned 1
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gaf_ddp import attach


def main() -> None:
    """Train a small network; the loss of one replica may be turned, as a fault would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turned", type=int, default=-1, help="a replica whose loss is negated")
    arguments = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    mesh = init_device_mesh(kind, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    replica = mesh["data"].get_local_rank()

    torch.manual_seed(0)
    rule = torch.randn(20, 4, device=kind)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)).to(kind)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = attach(model, optimizer, mesh=mesh)

    torch.manual_seed(replica + 1)  # ranks of one replica draw the same data
    loss = torch.zeros(())
    for _ in range(arguments.steps):
        inputs = torch.randn(32, 20, device=kind)
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ rule).argmax(1))
        optimizer.zero_grad()
        (-loss if replica == arguments.turned else loss).backward()
        optimizer.step()

    if dist.get_rank() == 0:
        kept = {name[-2:]: f"{share:.2f}" for name, share in state.summary().items() if "kept_rank" in name}
        print(f"loss {loss.item():.3f}, kept {kept}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
