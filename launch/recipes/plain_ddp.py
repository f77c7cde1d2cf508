"""Train under DistributedDataParallel, filtered.

torchrun --nproc-per-node 4 launch/recipes/plain_ddp.py --turned 1
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp import attach


def main() -> None:
    """Train a small network; the loss of one rank may be turned, as a fault would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turned", type=int, default=-1, help="a rank whose loss is negated")
    arguments = parser.parse_args()

    on_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpus else torch.device("cpu")

    torch.manual_seed(0)
    rule = torch.randn(20, 4, device=device)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = attach(model, optimizer)

    torch.manual_seed(rank + 1)  # from here on ranks draw data of their own
    loss = torch.zeros(())
    for _ in range(arguments.steps):
        inputs = torch.randn(32, 20, device=device)
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ rule).argmax(1))
        optimizer.zero_grad()
        (-loss if rank == arguments.turned else loss).backward()
        optimizer.step()

    if rank == 0:
        kept = {name[-2:]: f"{share:.2f}" for name, share in state.summary().items() if "kept_rank" in name}
        print(f"loss {loss.item():.3f}, kept {kept}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
