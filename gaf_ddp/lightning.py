"""AgreementCallback for Lightning's Trainer; `lightning` or `pytorch_lightning` must be installed."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from gaf_ddp.attach import attach, can_skip, given_or_new
from gaf_ddp.skip import skip_on_disagreement
from gaf_ddp.state import GAFState

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback  # the same, under its older name


class AgreementCallback(Callback):  # type: ignore[misc]
    """Let Lightning's Trainer average the gradients that agree; on any device, with the DDP strategy.

        trainer = Trainer(strategy="ddp", callbacks=[AgreementCallback()])

    Steps on which nothing agrees are left out exactly, for every optimizer; `trainer.global_step` counts them.
    `state.summary()` is logged every `log_every_n_steps` of the Trainer, and begins anew then. The state is in the
    Trainer's checkpoints. On one device without DDP there is nothing to filter: a warning, and training as ever.

    Args:
        state: of this callback alone; a new one if None.
        **settings: of the new state, see `GAFState`.

    Attributes:
        state: the hook's state.

    Raises:
        TypeError: there are both state and settings. As a fit begins: the strategy is none that `attach` takes.
        ValueError: a setting is out of its range. As a fit begins: the strategy has a `ddp_comm_hook`, or the
            Trainer another AgreementCallback.
    """

    def __init__(self, *, state: GAFState | None = None, **settings: Any) -> None:
        self.state = given_or_new(state, settings)
        self._undo: list[Callable[[], None]] = []
        self._seen = 0  # the state's step at the end of the last batch

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the hook on what the strategy made of the module."""
        count = sum(isinstance(callback, AgreementCallback) for callback in trainer.callbacks)
        if count > 1:
            raise ValueError(f"callbacks must hold one AgreementCallback, found {count}")
        # Lightning has no public name for it, and registers it on CUDA only, without a word elsewhere.
        theirs = getattr(trainer.strategy, "_ddp_comm_hook", None)
        if theirs is not None:
            raise ValueError(f"the strategy's ddp_comm_hook must be None beside this callback, found {theirs!r}")
        model = trainer.strategy.model
        if trainer.world_size == 1 and not isinstance(model, DistributedDataParallel):
            message = "gaf_ddp: one device, no other gradients to filter against: trains without a filter"
            warnings.warn(message, stacklevel=2)
            return
        attach(model, state=self.state)
        if can_skip(self.state):
            self._undo = [skip_on_disagreement(optimizer, self.state) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on from the step that a checkpoint may have brought."""
        self._seen = self.state.step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log when the Trainer's loggers listen: after each n-th batch that ended a step."""
        ended, self._seen = self.state.step != self._seen, self.state.step
        # The Trainer's own count, private; with one optimizer it is global_step.
        batches = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step - 1) + 1
        if ended and trainer.log_every_n_steps and batches % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.state.summary(), on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimizers as they were; the hook goes with DDP."""
        while self._undo:
            self._undo.pop()()

    def state_dict(self) -> dict[str, Any]:
        """Return the state's `state_dict()`."""
        return self.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.state.load_state_dict(state_dict)
