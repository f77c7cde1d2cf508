"""The callback for Hugging Face's Trainer: filters, leaves steps out, logs, and resumes as if not disturbed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.by_hand import QUIET, RULES, STEPS, as_torchrun, assert_same_state, loss_of, sgd
from tests.nets import assert_replicas_equal, batches, flat_parameters, mlp

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from gaf_ddp.transformers import AgreementCallback  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

Ranks = Callable[..., list[Any]]


class Net(nn.Module):
    """A network as the Trainer calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.inner(inputs)
        return {"loss": loss_of(outputs, labels), "logits": outputs}


def trainer_of(folder: str, steps: int, **options: Any) -> Any:
    """Return a Trainer that saves in the middle, and logs every two steps."""
    examples = [
        {"inputs": x, "labels": y}
        for inputs, labels in batches(0, 2 * STEPS)
        for x, y in zip(inputs, labels, strict=True)
    ]
    plain = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 2, "seed": 0}
    saving = {"save_steps": STEPS // 2, "per_device_train_batch_size": 6, "max_steps": steps}
    arguments = transformers.TrainingArguments(output_dir=folder, **{**plain, **saving, **options})
    module = Net()
    return transformers.Trainer(module, arguments, train_dataset=examples, optimizers=(sgd(module), None))


def train(folder: str, settings: dict[str, Any], steps: int = STEPS, resume: Any = None, **options: Any) -> Any:
    """Return Trainer and callback after README's lines for Hugging Face."""
    trainer = trainer_of(folder, steps, **options)
    callback = AgreementCallback(trainer, **settings)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def filters_and_resumes(device: torch.device, folder: str) -> None:
    as_torchrun()
    for number, settings in enumerate(RULES):
        own = str(Path(folder, str(number)))
        trainer, whole = train(own, settings)
        assert whole.state.step == STEPS
        assert not whole.state._records.followers  # undone with the training
        summaries = [each for each in trainer.state.log_history if "gaf/kept_rank_01" in each]
        losses = [each for each in trainer.state.log_history if "loss" in each]
        assert [each["step"] for each in summaries] == [each["step"] for each in losses] == [2, 4, 6, 8]
        skipped = sum(each["gaf/skipped_fraction"] for each in summaries)
        assert 0 < skipped < 4 if "tau" in settings else skipped == 0
        expected = flat_parameters(trainer.model)
        assert_replicas_equal(trainer.model)

        checkpoint = str(Path(own, f"checkpoint-{STEPS // 2}"))
        for given in ({}, {"resume_from_checkpoint": checkpoint}):
            resumed, second = train(own, settings, resume=checkpoint, save_strategy="no", **given)  # type: ignore[arg-type]
            assert torch.equal(flat_parameters(resumed.model), expected)
            assert_same_state(second.state, whole.state)
        averaged, _ = train(own, {"tau": 2.0}, save_strategy="no")
        assert not torch.equal(flat_parameters(averaged.model), expected)  # the filter had something to do


def skips(device: torch.device, folder: str) -> None:
    """With a rule by which nothing ever agrees, nothing moves, neither by decay nor by momentum."""
    module = Net()
    before = flat_parameters(module)
    trainer, _ = train(folder, {"weighting": nobody}, steps=2, save_strategy="no")
    assert torch.equal(flat_parameters(trainer.model), before)


def nobody(gramian: Tensor) -> Tensor:
    return torch.zeros_like(gramian[0])


def says_what_is_missing(device: torch.device, folder: str) -> None:
    """A checkpoint without the callback's file is resumed with a warning; two callbacks are refused."""
    trainer_of(folder, STEPS // 2).train()
    checkpoint = str(Path(folder, f"checkpoint-{STEPS // 2}"))
    with pytest.warns(UserWarning, match=r"gaf_ddp: resumed without .*gaf_ddp\.pt"):
        train(folder, {}, resume=checkpoint, save_strategy="no")
    trainer = trainer_of(folder, 1)
    for _ in range(2):
        trainer.add_callback(AgreementCallback(trainer))
    with pytest.raises(ValueError, match="callbacks must hold one AgreementCallback, found 2"):
        trainer.train()


def on_two_ranks(device: torch.device, folder: str) -> None:
    filters_and_resumes(device, folder)
    skips(device, str(Path(folder, "skips")))
    says_what_is_missing(device, str(Path(folder, "missing")))


def test_filters_skips_logs_and_resumes(gloo_ranks: Ranks, tmp_path: Path) -> None:
    gloo_ranks(2, on_two_ranks, str(tmp_path))


def test_one_process_trains_without_a_filter(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="gaf_ddp: one process, no other gradients to filter against"):
        _, callback = train(str(tmp_path), {}, steps=2, save_strategy="no")
    assert callback.state.step == 0


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"trainer must be a transformers.Trainer, found int"):
        AgreementCallback(3)
    trainer = trainer_of(str(tmp_path), 1)
    with pytest.raises(TypeError, match="state and settings exclude each other, found both: tau"):
        AgreementCallback(trainer, state=AgreementCallback(trainer).state, tau=1.0)
