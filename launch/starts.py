"""What this process and torchrun, which starts it, have between them: a store, and the reason of a failure."""

import contextlib
import json
import os
import time
import uuid
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_PAUSE = 0.01  # seconds between two looks at the store


def store_of_this_start(store: Store, rank: int, world: int, wait: float = 1800) -> Store:
    """Return a part of torchrun's store that only the ranks of this start use.

    When torchrun starts ranks again, its store still holds the addresses of those that died, and new ones that read
    them would wait for the dead. So rank 0 chooses a new name, and tells it to whoever shows a new token: an answer
    to a token that was never used before cannot be an old one. A count of restarts would not do, as several nodes
    may count differently.

    Raises:
        DistStoreError: a rank did not come within so many seconds, or within the store's time-out.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        end = time.monotonic() + wait
        for other in range(1, world):
            _welcome(store, other, name, end)
    else:
        token = name
        store.set(f"token of rank {rank}", token)
        name = store.get(f"answer to {token}").decode()
        store.set(f"rank {rank} is in {name}", "")
    return PrefixStore(name, store)


def _welcome(store: Store, other: int, name: str, end: float) -> None:
    """Tell another rank the name, until it says that it knows it."""
    while not store.check([f"rank {other} is in {name}"]):
        if time.monotonic() > end:
            raise dist.DistStoreError(f"rank {other} must start in time, found nothing of it")
        token = store.get(f"token of rank {other}").decode()  # perhaps that of a rank that died: nobody hears it
        store.set(f"answer to {token}", name)
        time.sleep(_PAUSE)


def tell_torchrun(reason: str) -> None:
    """Let the summary with which torchrun ends close with this reason, in place of advice on how to find one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        more = {"py_callstack": reason.strip(), "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # a full disk: the reason has been printed
            Path(path).write_text(json.dumps({"message": {"message": reason, "extraInfo": more}}))
