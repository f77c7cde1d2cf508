"""Train with DeepSpeed's ZeRO, filtered.

torchrun --nproc-per-node 4 launch/recipes/zero.py --turned 1      (on CPUs with DS_ACCELERATOR=cpu)
"""

import argparse

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from gaf_ddp import GAFState, filter_parameters


def main() -> None:
    """Train a small network; the loss of one rank may be turned, as a fault would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turned", type=int, default=-1, help="a rank whose loss is negated")
    parser.add_argument("--stage", type=int, default=2)
    arguments = parser.parse_args()

    deepspeed.init_distributed()
    rank, device = dist.get_rank(), torch.device(deepspeed.get_accelerator().current_device_name())
    torch.manual_seed(0)
    rule = torch.randn(20, 4, device=device)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "zero_optimization": {"stage": arguments.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    model, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    state = GAFState()
    filter_parameters(model.module.parameters(), state)

    torch.manual_seed(rank + 1)  # from here on ranks draw data of their own
    loss = torch.zeros(())
    for _ in range(arguments.steps):
        inputs = torch.randn(32, 20, device=device)
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ rule).argmax(1))
        model.backward(-loss if rank == arguments.turned else loss)
        model.step()
        state.advance()

    if rank == 0:
        kept = {name[-2:]: f"{share:.2f}" for name, share in state.summary().items() if "kept_rank" in name}
        print(f"loss {loss.item():.3f}, kept {kept}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
