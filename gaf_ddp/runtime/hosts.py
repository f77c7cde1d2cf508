"""Which machine a rank is on."""

import os
import socket
from collections.abc import Sequence


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
