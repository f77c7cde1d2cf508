"""The DDP model behind a hook: whose buckets these are, and what a hook cannot filter."""

import weakref
from collections.abc import Sequence
from gc import get_objects

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Model:
    """The model that a state filters, known by the parameters of its buckets.

    A hook is not told its model, and torch has no way to ask. So this looks for it among all objects, some 100 ms
    once. One that is not found, as after `gc.freeze()`, is not compared with anything.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        found = _find(parameters)
        self._model = None if found is None else weakref.ref(found)
        self.process_group: dist.ProcessGroup | None = getattr(found, "process_group", None)
        # DDP calls the hook for no bucket that nobody used then, perhaps not for the last one. None: not known.
        self.leaves_out_buckets: bool | None = getattr(found, "skip_all_reduce_unused_params", None)
        self._known: set[tuple[int, ...]] = set()

    @property
    def wrapped(self) -> DistributedDataParallel | None:
        """The model, if it was found and still lives."""
        return None if self._model is None else self._model()

    def require_own(self, parameters: Sequence[Tensor]) -> None:
        """Raise ValueError if these are another model's parameters."""
        key = tuple(map(id, parameters))
        model = self.wrapped
        if model is not None and model.process_group is not self.process_group:
            raise ValueError("process_group of the model was changed while training: make a new GAFState, and model")
        if key in self._known or model is None:
            return
        own = set(map(id, parameters_of(model)))
        if not own.issuperset(key):
            rule = "state must be of this model: make a GAFState for each model"
            raise ValueError(f"{rule}, found gradients of another model than {type(model.module).__name__}")
        self._known.add(key)

    def parameters_or(self, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the model's parameters, or these if it is not known."""
        model = None if self._model is None else self._model()
        return own if model is None else parameters_of(model)

    def require_group(self, group: dist.ProcessGroup) -> None:
        """Raise ValueError if the model averages over another group."""
        theirs = self.process_group
        if theirs is not None and theirs.group_name != group.group_name:
            ranks, their_ranks = dist.get_process_group_ranks(group), dist.get_process_group_ranks(theirs)
            raise ValueError(
                f"process_group must be the model's own, found {group.group_name!r} of ranks {ranks} beside "
                f"the model's {theirs.group_name!r} of ranks {their_ranks}"
            )


def parameters_of(model: DistributedDataParallel) -> list[Tensor]:
    """Return what DDP reduces: beside tensor parallelism the module's own change with each forward."""
    found: list[Tensor] = getattr(model, "_module_parameters", None) or list(model.parameters())
    return found


def _find(parameters: Sequence[Tensor]) -> DistributedDataParallel | None:
    wanted = {id(parameter) for parameter in parameters}
    # Not isinstance, which asks an abstract class about each of some 400,000 objects: half a second.
    for model in [each for each in get_objects() if DistributedDataParallel in type(each).__mro__]:
        if wanted <= set(map(id, parameters_of(model))):
            found: DistributedDataParallel = model
            return found
    return None
