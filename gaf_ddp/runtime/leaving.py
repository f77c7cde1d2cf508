"""The end of the process: what is on its way to other ranks arrives first, and process groups are let go of.

A thread of gloo that drops a tensor while the interpreter ends aborts the process: "terminate called without an active
exception". gloo ends its threads with the last reference to a group, and a state, its model and others hold each other.
"""

import atexit
import gc
import sys
from datetime import timedelta
from typing import Any, Protocol
from weakref import WeakSet

_PATIENCE = timedelta(seconds=2)  # with what nobody will read


class Sender(Protocol):
    """What sends without waiting."""

    def on_the_way(self) -> list[Any]:
        """Return the works that may not be done."""


_senders: WeakSet[Any] = WeakSet()
_held: list[Any] = []  # works, so that no thread is the last to hold one


def arrives_before_the_end(sender: Sender) -> None:
    """Let the process end after what this has sent, if it arrives within two seconds."""
    _senders.add(sender)


@atexit.register
def _leave() -> None:
    has_failed = hasattr(sys, "last_type")  # an exception that nobody caught
    for sender in list(_senders):
        for work in sender.on_the_way():
            _held.append(work)
            try:
                work.wait(_PATIENCE)
            except RuntimeError:  # a rank is gone, which whoever needed it has said
                has_failed = True
    if not has_failed:  # else a group may wait for what never comes
        gc.collect()
