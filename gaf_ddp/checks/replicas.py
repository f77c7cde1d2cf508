"""Are the replicas still the same? Hashes of their bits, compared between the ranks, name those that differ."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gaf_ddp.kernels.hash import hash_bits
from gaf_ddp.runtime.collectives import all_gather_single, all_gather_text
from gaf_ddp.runtime.device import on_host
from gaf_ddp.runtime.hosts import machine, own_host


def check_replicas(
    model: nn.Module, optimizer: Optimizer | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """Compare the bits of all ranks' parameters, and of the optimizer's state if it is given; a collective.

    Buffers are not compared: DDP broadcasts rank 0's. Reads each parameter once, sends 16 bytes to each rank, and
    waits for the device.

    Args:
        model: under DDP, or another whose parameters are the same on every rank.
        optimizer: keeps the same state on every rank; ZeroRedundancyOptimizer does not.
        group: None is DDP's own, or the default group.

    Raises:
        RuntimeError: on every rank: some differ. Names the ranks that differ from the majority, and their hosts;
            without a majority all sides.
        ValueError: a parameter is a DTensor, which is no replica.
    """
    parameters = list(model.parameters())
    if any(hasattr(parameter, "to_local") for parameter in parameters):
        raise ValueError("model must have whole parameters on every rank, found a DTensor")
    group = group_of(model, group)
    device = parameters[0].device
    parts: dict[str, Sequence[Tensor]] = {"parameters": parameters, "the optimizer's state": _state_of(optimizer)}
    everyone = gathered(torch.stack([hash_bits(part, device) for part in parts.values()]), group).tolist()
    for name, values in zip(parts, zip(*everyone, strict=True), strict=True):
        if len(set(values)) > 1:
            hosts = all_gather_text(own_host(), group, device)
            raise RuntimeError(f"{name} must be the same on every rank, {differing(values, hosts)}")


class ReplicaCheck:
    """Compare a filtered model's parameters every so many steps; on accelerators nobody waits for the result.

    Args:
        every: steps; None is never.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._started: tuple[int, Tensor, torch.Event | None, Sequence[str]] | None = None

    def start(
        self, step: int, parameters: list[Tensor], group: dist.ProcessGroup, hosts: Sequence[str], takes_part: bool
    ) -> None:
        """Hash and gather, if it is time to; on the CPU `finish` at once, on accelerators first the check before.

        Args:
            step: steps that the parameters have seen.
            parameters: the same on every rank, in the same order.
            group: the W ranks.
            hosts: of the ranks.
            takes_part: whether this rank's are to be compared: not while it waits for the others in DDP's Join.
        """
        if self._every is None or step % self._every or not parameters:
            return
        self.finish()
        device = parameters[0].device
        own = torch.stack([hash_bits(parameters, device), torch.full((), takes_part, device=device).long()])
        everyone = gathered(own, group)
        event = None
        if device.type != "cpu":
            read = everyone.to("cpu", non_blocking=True)  # into pinned memory
            event = torch.Event(device)
            event.record(torch.get_device_module(device).current_stream(device))
            everyone = read
        self._started = step, everyone, event, hosts
        if on_host(own):
            self.finish()

    def finish(self) -> None:
        """Wait for the comparison that has been started, and raise RuntimeError if ranks differ."""
        if self._started is None:
            return
        (step, everyone, event, hosts), self._started = self._started, None
        if event is not None:
            event.synchronize()
        bits, takes_part = everyone.unbind(1)
        require_equal(torch.stack([bits >> 32, bits & 0xFFFFFFFF], 1), takes_part == 0, hosts, step)

    def __getstate__(self) -> dict[str, object]:
        """Return the setting: what has been started belongs to this process."""
        return {"_every": self._every, "_started": None}


def require_equal(hashes: Tensor, finished: Tensor, hosts: Sequence[str], step: int) -> None:
    """Raise RuntimeError if the hashes `(W, 2)` of ranks that train differ; names those that differ, and hosts."""
    values = [
        None if waits else int(high) << 32 | int(low)
        for (high, low), waits in zip(hashes.tolist(), finished.tolist(), strict=True)
    ]
    if len(set(values) - {None}) > 1:
        rule = f"check_every: parameters must be the same on every rank, at step {step}"
        raise RuntimeError(f"{rule} {differing(values, hosts)}")


def group_of(model: nn.Module, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group that was given, or DDP's own, or the default group."""
    group = group or getattr(model, "process_group", None) or dist.group.WORLD
    assert group is not None
    return group


def majority(values: Sequence[int | None]) -> int | None:
    """Return the value that more than half of the ranks with a value have, or None."""
    (value, count), *_ = Counter(value for value in values if value is not None).most_common(1)
    return value if 2 * count > sum(other is not None for other in values) else None


def differing(values: Sequence[int | None], hosts: Sequence[str]) -> str:
    """Return who differs from the majority, or, without one, which ranks are alike; None is no value."""
    common = majority(values)
    sides: dict[int, list[str]] = {}
    for rank, value in enumerate(values):
        if value is not None and value != common:
            host = machine(hosts[rank]) if rank < len(hosts) else ""
            sides.setdefault(value, []).append(f"{rank} ({host})")
    named = [f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for ranks in sides.values()]
    if common is not None:
        return f"found others on {' and '.join(named)} than on most"
    return f"found no majority, but others on {' than on '.join(named)}"


def gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return everyone's numbers `(W, k)`."""
    everyone = own.new_empty(group.size() * len(own))
    all_gather_single(everyone, own, group=group)
    return everyone.view(group.size(), -1)


def _state_of(optimizer: Optimizer | None) -> list[Tensor]:
    """Return an optimizer's tensors and numbers, in an order that is the same on every rank."""
    found = []
    for group in optimizer.param_groups if optimizer else []:
        for parameter in group["params"]:
            of_parameter = optimizer.state.get(parameter, {}) if optimizer else {}
            for name in sorted(of_parameter):
                value = of_parameter[name]
                if isinstance(value, (int, float)):
                    value = torch.tensor(value, dtype=torch.float64)
                if isinstance(value, Tensor):
                    found.append(value)
    return found
