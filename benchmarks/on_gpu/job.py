"""What one process of a stage is told, and its process group."""

import os
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.on_gpu.rows import Rows

STORE = "GAF_ON_GPU_STORE"  # the variable with the file that ranks meet in


@dataclass(frozen=True)
class Job:
    """One part of a stage, as one rank of it sees it.

    until: when it is killed, as time.time() counts. micro_batches: of the accuracy stage's arms.
    """

    part: str
    rehearse: bool
    until: float
    rows: Rows
    data_dir: Path | None = None
    micro_batches: tuple[int, ...] = (2,)

    @property
    def device(self) -> torch.device:
        """The GPU, which all ranks share, or the CPU in a rehearsal."""
        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)

    def left(self) -> float:
        """Return the seconds that are left, but for a few to end in."""
        return self.until - time.time() - 4

    def agreed_left(self) -> float:
        """Return the fewest seconds that any rank has left, the same on every rank."""
        least = torch.tensor(self.left(), dtype=torch.float64, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return float(least)


def join_group(device: torch.device) -> None:
    """Make the group of this job's ranks: NCCL for a rank that has the GPU for itself, else gloo."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # a lent machine's own name may lead nowhere
    file = os.environ.get(STORE) or str(Path(tempfile.mkdtemp()) / "store")
    alone = device.type == "cuda" and world == 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if alone else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
        device_id=device if alone else None,
    )
