"""Do all ranks compute the same? One batch on every rank, and gradients that must be equal to the bit.

Between different batches nobody can tell a device that computes a little wrong; on the same one everybody can.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp.checks.replicas import gathered, group_of, majority
from gaf_ddp.engines.apart import apart
from gaf_ddp.kernels.hash import hash_bits
from gaf_ddp.monitor.report import AuditReport, RankAudit
from gaf_ddp.runtime.collectives import all_gather_text
from gaf_ddp.runtime.hosts import machine, own_host


def audit(
    model: nn.Module,
    step: Callable[..., Tensor],
    batch: Sequence[Tensor] = (),
    group: dist.ProcessGroup | None = None,
) -> AuditReport:
    """Compare the ranks' gradients on rank 0's batch, from rank 0's random state and buffers; a collective.

        audit(model, lambda inputs, targets: criterion(model(inputs), targets), batch).require_equal()

    Finds ranks whose parameters or arithmetic differ. The filter cannot: such gradients are nearly those of the others.
    Needs the same hardware and kernels on every rank. Nothing is averaged, no hook of DDP runs; parameters' `grad`,
    buffers, torch's random state (of the CPU and the device) and DDP itself are as before afterwards. Takes one forward
    and backward, holds one gradient, sends the batch and 8 bytes a rank; where they differ, a gradient too. Waits for
    the device.

    Args:
        model: under DDP, or another with the same parameters on every rank; on one device.
        step: computes the loss of a batch through the model, as in training, but without backward. Checkpoints in
            it must have `use_reentrant=False`.
        batch: what step is called with, on the model's device; of rank 0 everywhere.
        group: None is DDP's own, or the default group.

    Returns:
        Who differs from the majority, or, without one, from rank 0, and by how much; the same on every rank.

    Raises:
        RuntimeError: on every rank: step failed on one.
    """
    group = group_of(model, group)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    device = next(iter(named.values())).device
    hosts = all_gather_text(own_host(), group, device)
    batch = _from_first(batch, group, device)
    gradients: list[Tensor | None] = []
    failure: Exception | None = None
    with _as_on_first(model, group, device):
        try:
            gradients = list(torch.autograd.grad(step(*batch), list(named.values()), allow_unused=True))
        except Exception as error:  # whatever it is, the others must not wait for this rank
            failure = error
    _require_done(failure, group, device)
    values = gathered(hash_bits(gradients, device)[None], group).flatten().tolist()
    common = majority(values)
    reference = 0 if common is None else values.index(common)
    off = [(0.0, 0)] * len(values)
    if len(set(values)) > 1:
        off = _differences(gradients, list(named.values()), reference, group)
    names = list(map(machine, hosts))
    ranks = []
    for rank, value in enumerate(values):
        equal, (difference, parameter) = value == values[reference], off[rank]
        found = (0.0, None) if equal else (difference, list(named)[parameter])
        ranks.append(RankAudit(rank, names[rank], equal, *found))
    return AuditReport(common is not None, ranks)


def _require_done(failure: Exception | None, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise RuntimeError on every rank if one failed."""
    own = json.dumps(failure and f"{type(failure).__name__}: {failure}")
    for rank, problem in enumerate(map(json.loads, all_gather_text(own, group, device))):
        if problem:
            raise RuntimeError(f"step must succeed on every rank, found on rank {rank} {problem}") from failure


@contextmanager
def _as_on_first(model: nn.Module, group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Lend every rank the first one's buffers and random state, apart from training."""
    with apart(model, device):
        for buffer in model.buffers():
            dist.broadcast(buffer, group=group, group_src=0)
        torch.set_rng_state(_broadcast(torch.get_rng_state(), group, device))
        if device.type != "cpu":
            module: Any = torch.get_device_module(device)
            module.set_rng_state(_broadcast(module.get_rng_state(device), group, device), device)
        yield


def _broadcast(state: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Return the first rank's bytes, which are on the host."""
    moved = state.to(device, copy=True)
    dist.broadcast(moved, group=group, group_src=0)
    return moved.cpu()


def _from_first(batch: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    """Return the first rank's tensors; those of others may be of another shape."""
    own = json.dumps([[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in batch])
    received = []
    for index, (dtype, shape) in enumerate(json.loads(all_gather_text(own, group, device)[0])):
        if group.rank() == 0:
            tensor = batch[index].detach().to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=0)
        received.append(tensor)
    return received


def _differences(
    gradients: list[Tensor | None], parameters: list[nn.Parameter], reference: int, group: dist.ProcessGroup
) -> list[tuple[float, int]]:
    """Return each rank's |g − reference| / |reference|, and in which parameter it differs most."""
    squares = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        own = torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
        theirs = own.detach().clone()
        dist.broadcast(theirs, group=group, group_src=reference)
        squares.append(torch.stack([(own.double() - theirs).square().sum(), theirs.double().square().sum()]))
    apart, whole = torch.stack(squares).nan_to_num(torch.inf, torch.inf).T
    off = (apart.sum() / whole.sum()).sqrt().nan_to_num(torch.inf, torch.inf)
    everyone = gathered(torch.stack([off, apart.argmax().double()]), group).tolist()
    return [(off, int(worst)) for off, worst in everyone]
