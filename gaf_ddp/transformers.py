"""AgreementCallback for Hugging Face's Trainer; `transformers` and `accelerate` must be installed."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gaf_ddp.attach import attach, can_skip, given_or_new
from gaf_ddp.skip import skip_on_disagreement
from gaf_ddp.state import GAFState

_FILE = "gaf_ddp.pt"  # in the checkpoint's folder


class AgreementCallback(TrainerCallback):  # type: ignore[misc]
    """Let Hugging Face's Trainer average the gradients that agree; on any device, under DDP.

        trainer = Trainer(model, args, train_dataset=dataset)
        trainer.add_callback(AgreementCallback(trainer))

    Steps on which nothing agrees are left out exactly; `global_step` counts them. `state.summary()` is logged with
    `trainer.log` every `logging_steps`, and begins anew then. The state is saved in the folder of each checkpoint,
    and loaded from the one that training resumes from: `args.resume_from_checkpoint` if that is a folder, else
    `checkpoint-<step>` in `args.output_dir`. In one process there is nothing to filter: a warning, and training as
    ever.

    Args:
        trainer: it tells callbacks of the bare model alone, so the callback asks it for the wrapped one.
        state: of this callback alone; a new one if None.
        **settings: of the new state, see `GAFState`.

    Attributes:
        state: the hook's state.

    Raises:
        TypeError: there are both state and settings, or trainer is no Trainer. As training begins: the model is in
            a wrapper that `attach` does not take, as DeepSpeed's.
        ValueError: a setting is out of its range. As training begins: the Trainer has another AgreementCallback.
    """

    def __init__(self, trainer: Any, *, state: GAFState | None = None, **settings: Any) -> None:
        if not hasattr(trainer, "model_wrapped"):
            raise TypeError(f"trainer must be a transformers.Trainer, found {type(trainer).__name__}")
        self.state = given_or_new(state, settings)
        self._trainer = trainer
        self._undo: list[Callable[[], None]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any) -> None:
        """Register the hook, and load the state of a checkpoint that training resumes from."""
        count = sum(isinstance(each, AgreementCallback) for each in self._trainer.callback_handler.callbacks)
        if count > 1:
            raise ValueError(f"callbacks must hold one AgreementCallback, found {count}")
        # A checkpoint of several processes may go on in one, and from there in several again.
        if state.global_step > 0:
            self._load(args, state.global_step)
        if args.world_size == 1 and args.n_gpu <= 1:
            message = "gaf_ddp: one process, no other gradients to filter against: trains without a filter"
            warnings.warn(message, stacklevel=2)
            return
        attach(self._trainer.model_wrapped, state=self.state)
        if can_skip(self.state):
            self._undo = [skip_on_disagreement(optimizer, self.state)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Log as the Trainer does, if it is about to."""
        if control.should_log and self.state.decisions:
            self._trainer.log(self.state.summary())
            control.should_log = True  # the Trainer's own numbers are still to come
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state beside the model."""
        if args.should_save:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            torch.save(self.state.state_dict(), folder / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was; the hook goes with DDP."""
        while self._undo:
            self._undo.pop()()

    def _load(self, args: Any, step: int) -> None:
        given = args.resume_from_checkpoint
        given = given if isinstance(given, str) and Path(given).is_dir() else None
        file = Path(given or Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")) / _FILE
        if file.exists():
            self.state.load_state_dict(torch.load(file, weights_only=True))
        else:
            warnings.warn(f"gaf_ddp: resumed without {file}: what is known of ranks begins anew", stacklevel=3)
