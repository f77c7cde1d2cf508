"""Who has a vote: a rank, or all ranks of a host together, whose gradients are averaged for it."""

import torch
from torch import Tensor

from gaf_ddp.runtime.hosts import numbered


class Voters:
    """Which ranks vote together.

    Args:
        of_ranks: each rank's voter, 0 to V − 1.

    Attributes:
        are_ranks: whether each is one rank.
    """

    def __init__(self, of_ranks: list[int]) -> None:
        self.count = len(set(of_ranks))
        self.of_ranks = torch.tensor(of_ranks)
        self.are_ranks = self.count == len(of_ranks)
        self._belongs = torch.nn.functional.one_hot(self.of_ranks, self.count).mT.double()  # (V, W)

    @classmethod
    def named(cls, voters: str, hosts: list[str]) -> "Voters":
        """Return the voters that a setting names, `"rank"` or `"host"`, given each rank's host."""
        return cls(numbered(hosts) if voters == "host" else list(range(len(hosts))))

    def mean(self, sketches: Tensor) -> Tensor:
        """Return the voters' sketches `(V, k)`, means over those of their ranks' that are finite; zeros for none."""
        finite = (0 * sketches).sum(1) == 0  # three launches, `isfinite().all(1)` is five
        clean = torch.where(finite[:, None], sketches, 0)
        if self.are_ranks:
            return clean
        self._belongs = self._belongs.to(sketches.device)  # once: the host would wait for the ballots here
        belongs = self._belongs * finite
        share = belongs / belongs.sum(1, keepdim=True).clamp(min=1)
        return (share @ clean.double()).float()  # float32 products may silently use TF32

    def any_of(self, ranks: Tensor) -> Tensor:
        """Return which voters have at least one of these ranks, bool `(W,)` to bool `(V,)`."""
        return torch.zeros(self.count, dtype=torch.int64).index_add_(0, self.of_ranks, ranks.long()) > 0

    def spread(self, values: Tensor) -> Tensor:
        """Return for ranks what there is for voters: `(V,)` to `(W,)`, `(V, V)` to `(W, W)`."""
        for dimension in range(values.dim()):
            values = values.index_select(dimension, self.of_ranks)
        return values
