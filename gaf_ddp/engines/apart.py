"""A forward and backward apart from training, of which nothing is left."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp.engines.shown import as_vector

Loss = Callable[[float], Tensor]  # from a temperature, by which the logits are divided


@contextmanager
def apart(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Let buffers and torch's random state, of the CPU and the device, be as before afterwards.

    DDP is passed by: it broadcasts no buffers, prepares no reduction, and counts no iteration, in Join too.
    """
    buffers = [] if model is None else list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        if isinstance(model, DistributedDataParallel):
            _pass_by(model, stack)
        try:
            with torch.enable_grad():
                yield
        finally:
            with torch.no_grad():
                for buffer, before in zip(buffers, kept, strict=True):
                    buffer.copy_(before)


def _pass_by(model: DistributedDataParallel, stack: ExitStack) -> None:
    """Let calls of a DDP model go to the module inside; where they do not, as when compiled, let DDP sync nothing."""
    stack.callback(setattr, model, "require_forward_param_sync", model.require_forward_param_sync)
    stack.enter_context(model.no_sync())
    model.require_forward_param_sync = False
    before = model.__dict__.get("forward")

    def restore() -> None:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before

    def inner(*args: Any, **kwargs: Any) -> Any:
        return model.module(*args, **kwargs)

    model.__dict__["forward"] = inner
    stack.callback(restore)


def gradient_of(
    loss: Loss, temperature: float, parameters: Sequence[Tensor], model: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Return the flat gradient `(N,)` of a loss, parameter by parameter, apart from training; no `grad` changes.

    Returns:
        The gradient, and the loss `()` float64.

    Raises:
        TypeError: loss returned something else than one number with a gradient.
    """
    with apart(model, parameters[0].device):
        value = require_loss(loss(temperature))
        found = torch.autograd.grad(value, list(parameters), allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([as_vector(each) for each in whole]), value.detach().double().view(())


def require_loss(value: object) -> Tensor:
    """Return the loss, or raise TypeError unless it is one number with a gradient."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        return value
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    if isinstance(value, Tensor) and not value.requires_grad:
        found += " without a gradient (was the model called under no_grad?)"
    raise TypeError(f"loss(temperature) must return one number with a gradient, found {found}")
