"""Hosts as voters: the sketches of a host's ranks are averaged, and it has one vote and one weight."""

import os
import socket
from collections.abc import Hashable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from gaf_ddp.agreement import Agreement
from gaf_ddp.gramian import Rows
from gaf_ddp.judges import Judge, Rule


def own_host() -> str:
    """Return this rank's host: the machine's name, and behind it the number of what torchrun calls a node."""
    return f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}".rstrip()


def machine(host: str) -> str:
    """Return the machine's name of a host."""
    return host.partition(" ")[0]


def numbered(hosts: Sequence[str]) -> list[int]:
    """Return each rank's host, numbered by its lowest rank."""
    first = sorted(set(hosts), key=hosts.index)
    return [first.index(host) for host in hosts]


class ByHosts:
    """Let another judge judge hosts; matrices and records are of ranks still, those of one host alike.

    Args:
        judge: has matrices `(r H, H)` for rows `(H, n)`.
        hosts: each rank's host, 0 to H − 1.
        device: where the rows are.
    """

    def __init__(self, judge: Judge, hosts: list[int], device: torch.device) -> None:
        self.judge = judge
        self._hosts = torch.tensor(hosts, device=device)
        self._ranks = torch.tensor([hosts.index(host) for host in sorted(set(hosts))], device=device)
        self._size = torch.tensor([hosts.count(host) for host in hosts], device=device)  # of each rank's host

    def measure(self, key: Hashable, rows: Rows) -> Tensor:
        """Return what the judge measures on the hosts' mean rows, `(r W, W)`; one that is not finite spoils it."""
        assert isinstance(rows, Tensor)
        mean = rows.new_zeros(len(self._ranks), rows.shape[1])
        mean.index_add_(0, self._hosts, rows / self._size[:, None])
        return self._picked(self.judge.measure(key, mean), self._hosts)

    def decide(
        self, keys: Sequence[Hashable], measured: Tensor, rule: Rule, max_norm_ratio: float | None
    ) -> Agreement:
        """Let the judge decide between hosts, and give every rank its part of its host's weight."""
        agreement = self.judge.decide(keys, self._picked(measured, self._ranks), rule, max_norm_ratio)
        found = {field.name: getattr(agreement, field.name) for field in fields(agreement)}
        of_ranks = {name: self._of_ranks(value) for name, value in found.items() if value is not None}
        return replace(agreement, **{**of_ranks, "weights": of_ranks["weights"] / self._size})

    def finish(self) -> None:
        """End a step."""
        self.judge.finish()

    def _of_ranks(self, value: Tensor) -> Tensor:
        """Return for ranks what there is for hosts: `()`, `(H,)` or `(H, H)`."""
        for dimension in range(value.dim()):
            value = value.index_select(dimension, self._hosts)
        return value

    def _picked(self, matrices: Tensor, at: Tensor) -> Tensor:
        """Return of r matrices below each other the rows and columns at these places."""
        square = matrices.view(-1, matrices.shape[1], matrices.shape[1])
        return square.index_select(1, at).index_select(2, at).flatten(0, 1)
