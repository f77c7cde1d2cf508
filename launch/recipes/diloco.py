"""Train with DiLoCo (arXiv 2311.08105), filtered, with torch alone: many steps apart, then an average of the moves.

torchrun --nproc-per-node 4 launch/recipes/diloco.py --turned 1
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn

from gaf_ddp import GAFState, filter_average


def main() -> None:
    """Train a small network; the loss of one worker may be turned, as a fault would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="outer ones, of ten inner ones each")
    parser.add_argument("--turned", type=int, default=-1, help="a worker whose loss is negated")
    arguments = parser.parse_args()

    on_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpus else torch.device("cpu")

    torch.manual_seed(0)
    rule = torch.randn(20, 4, device=device)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    shared = [each.detach().clone().requires_grad_() for each in model.parameters()]
    outer = torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)
    inner = torch.optim.AdamW(model.parameters(), lr=0.003)
    state = GAFState(momentum=0.9)  # there are few rounds

    torch.manual_seed(rank + 1)  # from here on workers draw data of their own
    loss = torch.zeros(())
    for _ in range(arguments.steps):
        for _ in range(10):
            inputs = torch.randn(32, 20, device=device)
            loss = nn.functional.cross_entropy(model(inputs), (inputs @ rule).argmax(1))
            inner.zero_grad()
            (-loss if rank == arguments.turned else loss).backward()
            inner.step()
        with torch.no_grad():
            moves = [before - now for before, now in zip(shared, model.parameters(), strict=True)]
            filter_average(moves, state)
            for before, move in zip(shared, moves, strict=True):
                before.grad = move
            outer.step()
            for before, now in zip(shared, model.parameters(), strict=True):
                now.copy_(before)

    if rank == 0:
        kept = {name[-2:]: f"{share:.2f}" for name, share in state.summary().items() if "kept_rank" in name}
        print(f"loss {loss.item():.3f}, kept {kept}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
