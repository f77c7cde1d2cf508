"""What a state asks of the way that a model's gradients go."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gaf_ddp.engines.apart import Loss


class Way:
    """The way of gradients in buckets, units, parameters or rounds, from the first of them on.

    A state has one, once it filters. What a way has no need of, it leaves as it is here.
    """

    def draw(self) -> None:
        """Wait for what the last step sent; no collective."""

    def recall(self) -> None:
        """Begin with what the judge remembers, which has been loaded."""

    def read(self, loss: "Loss") -> None:
        """Fold the gradients of a loss on held-out data, for a later ballot; RuntimeError where there are none."""
        raise RuntimeError("reference is for models that the consensus rule filters")

    def advance(self) -> None:
        """End a step, where the engine does not say when it ends; RuntimeError where it does."""
        raise RuntimeError("advance() is for filter_parameters: other ways know by themselves when a step ends")
