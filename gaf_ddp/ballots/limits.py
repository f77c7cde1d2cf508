"""How long a bucket's gradient may be: so many upper median norms of the ranks that count."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp.ballots.places import Key
from gaf_ddp.rules.medians import upper_median
from gaf_ddp.runtime.collectives import all_gather_single
from gaf_ddp.runtime.device import to_device


class Limits:
    """The longest norm of each bucket, on the host by the last verdict, and on the device for the kernels.

    Args:
        group: the W ranks.
        device: of the gradients.
        asks: whether the others are asked for their norms of a bucket that no verdict knows; else it has no limit.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, asks: bool = True) -> None:
        self._group, self._device, self._asks = group, device, asks
        self._on_host: dict[Key, Tensor] = {}  # (W,), of all ranks
        self._on_device: dict[Key, Tensor] = {}

    def of(self, key: Key, square: Tensor, ratio: float | None) -> Tensor:
        """Return a bucket's limit `()` float64; of one that no verdict knows by all ranks' norms of it now.

        Args:
            key: of the bucket.
            square: `()` float64, this rank's squared norm of it.
            ratio: upper medians; None for no limit.
        """
        if key not in self._on_device and not self._asks:
            self._on_device[key] = torch.full((), math.inf, dtype=torch.float64, device=self._device)
        if key not in self._on_device:
            everyone = square.new_empty(self._group.size())
            all_gather_single(everyone, square.view(1), group=self._group)
            median = upper_median(everyone.sqrt(), everyone.isfinite() & (everyone > 0))
            self._on_device[key] = (math.inf if ratio is None else ratio) * median
        return self._on_device[key]

    def held(self, keys: Iterable[Key]) -> list[Tensor]:
        """Return the limits `()` of buckets that came, on the device."""
        return [self._on_device[key] for key in keys]

    def known(self, keys: Sequence[Key]) -> Tensor:
        """Return all ranks' limits `(W, buckets)` on the host; inf where no verdict said any."""
        unknown = torch.full((self._group.size(),), math.inf, dtype=torch.float64)
        return torch.stack([self._on_host.get(key, unknown) for key in keys], 1)

    def set(self, keys: Sequence[Key], longest: Tensor) -> None:
        """Take over a verdict's limits `(W, buckets)`, which are on the host; nobody waits for the device."""
        self._on_host |= zip(keys, longest.unbind(1), strict=True)
        own = longest[self._group.rank()]
        self._on_device |= zip(keys, to_device(own, self._device).unbind(), strict=True)
