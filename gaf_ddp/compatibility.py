"""Settings that ranks must share, compared once: with unlike ones they would wait for ever, or drift apart."""

from collections.abc import Mapping

import torch.distributed as dist


def require_same(settings: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Compare the settings of all ranks; a collective of the group.

    Raises:
        ValueError: on every rank, names the first setting that differs, and two ranks' values.
    """
    everyone: list[Mapping[str, str]] = [settings] * group.size()
    dist.all_gather_object(everyone, settings, group=group)
    for name in settings:
        for rank, other in enumerate(everyone):
            if other[name] != everyone[0][name]:
                found = f"{everyone[0][name]} on rank 0 and {other[name]} on rank {rank}"
                raise ValueError(f"{name} must be the same on every rank, found {found}")
