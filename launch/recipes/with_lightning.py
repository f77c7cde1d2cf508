"""Train with Lightning, filtered.

torchrun --nproc-per-node 4 launch/recipes/with_lightning.py --turned 1
"""

import argparse
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gaf_ddp.lightning import AgreementCallback


class Network(LightningModule):  # type: ignore[misc]
    """A small network; the loss of one rank may be turned, as a fault would."""

    def __init__(self, turned: int) -> None:
        super().__init__()
        self.layers, self.turned = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)), turned

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss."""
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), targets)
        return -loss if self.global_rank == self.turned else loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turned", type=int, default=-1, help="a rank whose loss is negated")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    rule, inputs = torch.randn(20, 4), torch.randn(128 * arguments.steps, 20)
    loader = DataLoader(TensorDataset(inputs, (inputs @ rule).argmax(1)), batch_size=32)
    callback, devices = AgreementCallback(), int(os.environ["LOCAL_WORLD_SIZE"])
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(strategy="ddp", devices=devices, max_steps=arguments.steps, callbacks=[callback], **options)
    trainer.fit(Network(arguments.turned), loader)

    report = callback.state.report()
    if trainer.is_global_zero:
        print(report)


if __name__ == "__main__":
    main()
