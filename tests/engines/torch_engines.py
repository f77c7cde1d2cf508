"""Engines that torch itself has, for tests of filter_parameters."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.optim import SGD

from tests.engines.engines import Engine, values_of
from tests.nets import ddp, mlp

CPU = torch.device("cpu")


def stepping(model: Any, parameters: Sequence[Tensor], backward: Any = Tensor.backward) -> Any:
    """Return a step of plain SGD."""
    optimizer = SGD(parameters, lr=0.1)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()

    return step


def beside(name: str) -> Engine:
    """Return DDP with one of torch's own hooks, or none."""
    module = mlp()
    # On gloo PowerSGD alone hangs with several buckets: it waits in callbacks.
    model = ddp(module, CPU, **({} if name == "powersgd" else {"bucket_cap_mb": 0.002}))
    if name == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=8, start_powerSGD_iter=2, min_compression_rate=0.5
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif name != "none":
        model.register_comm_hook(None, getattr(default_hooks, f"{name}_hook"))
    parameters = list(module.parameters())
    return Engine(model, parameters, stepping(model, parameters), partial(values_of, parameters))


def fsdp1(use_orig_params: bool) -> Engine:
    """Return FSDP1 of two units."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    module = mlp()
    module[0] = FSDP(module[0], device_id=CPU, use_orig_params=use_orig_params)
    model = FSDP(module, device_id=CPU, use_orig_params=use_orig_params)
    units: list[Any] = FSDP.fsdp_modules(model)
    flat = [each._handle.flat_param for each in units]
    parameters: Sequence[Tensor] = flat if use_orig_params else list(model.parameters())

    def values() -> Tensor:
        with FSDP.summon_full_params(model):
            return values_of(p for p in module.parameters())

    return Engine(model, parameters, stepping(model, list(model.parameters())), values)


def replicated() -> Engine:
    """Return composable `replicate`."""
    from torch.distributed._composable.replicate import replicate

    model = replicate(mlp())
    parameters = list(model.parameters())
    return Engine(model, parameters, stepping(model, parameters), partial(values_of, parameters))


def megatron() -> Engine:
    """Return Megatron's way on a CPU: hooks add gradients to a float32 buffer, which is all-reduced."""
    model = mlp()
    parameters: list[Any] = list(model.parameters())
    buffer = torch.zeros(sum(each.numel() for each in parameters))
    for each, part in zip(parameters, buffer.split([each.numel() for each in parameters]), strict=True):
        each.main_grad = part.view_as(each)

        def add(parameter: Any) -> None:
            parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

        each.register_post_accumulate_grad_hook(add)

    def step(loss: Tensor) -> None:
        buffer.zero_()
        for part in (0.25, 0.75):  # two backwards of a step
            (part * loss).backward(retain_graph=part == 0.25)
        dist.all_reduce(buffer)
        with torch.no_grad():
            for each in parameters:
                each.sub_(each.main_grad, alpha=0.1 / dist.get_world_size())

    return Engine(model, parameters, step, partial(values_of, parameters))
