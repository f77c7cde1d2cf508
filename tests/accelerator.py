"""The way buckets take on accelerators, on a machine without one: all of it but streams and Triton's kernels."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from gaf_ddp.exchange import pipeline
from gaf_ddp.exchange.lanes import Promise, StreamLane
from gaf_ddp.exchange.protocol import GatherExchange, ShardedExchange
from gaf_ddp.exchange.sketched import SketchExchange
from gaf_ddp.runtime import device as devices


class NoStream(StreamLane):
    """An accelerator's lane on a device without streams: the work is done inside the hook, by collectives."""

    def __init__(
        self, parent: dist.ProcessGroup, device: torch.device, wire_dtype: torch.dtype | None, sketch_size: int
    ) -> None:
        self.group = self.small_messages = parent
        self.gather = GatherExchange(parent, wire_dtype)
        self.sharded = ShardedExchange(parent, wire_dtype)
        self.sketch = SketchExchange(parent, sketch_size, wire_dtype)

    def promise(self) -> Promise:
        return Promise()

    def run(self, work: Callable[[], None], awaited: bool = True) -> None:
        with torch.no_grad():
            work()


def take_accelerators_way() -> None:
    """Let this process's CPU pass for an accelerator: a rank's, which ends with its test."""
    pipeline.open_lane = NoStream  # type: ignore[attr-defined]
    devices._HOST = "no device"
