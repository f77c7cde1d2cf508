"""Train with Hugging Face's Trainer, filtered.

torchrun --nproc-per-node 4 launch/recipes/with_transformers.py --turned 1
"""

import argparse
import os
import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gaf_ddp.transformers import AgreementCallback


class Network(nn.Module):
    """A small network; the loss of one rank may be turned, as a fault would."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.layers, self.turned = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)), turned

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits, as the Trainer wants them."""
        logits = self.layers(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": -loss if self.turned else loss, "logits": logits}


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turned", type=int, default=-1, help="a rank whose loss is negated")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    rule, inputs = torch.randn(20, 4), torch.randn(4096, 20)
    examples = [{"inputs": x, "labels": y} for x, y in zip(inputs, (inputs @ rule).argmax(1), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=arguments.steps, per_device_train_batch_size=32, learning_rate=0.01, report_to=[],
            use_cpu=not torch.cuda.is_available(), save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        turned = int(os.environ["RANK"]) == arguments.turned
        trainer = Trainer(Network(turned), options, train_dataset=examples)
        callback = AgreementCallback(trainer)
        trainer.add_callback(callback)
        trainer.train()

    report = callback.state.report()
    if trainer.is_world_process_zero():
        print(report)


if __name__ == "__main__":
    main()
