"""Running the hook's work beside backward, in bucket order on every rank: the one place that chooses by device.

Collectives must be issued in the same order everywhere. On gloo, callbacks run in any order, and DDP uses its own group
meanwhile, so the work goes through one thread with groups of its own. On an accelerator it is enqueued in the hook.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd import Variable

from gaf_ddp.exchange.stream import StreamLane
from gaf_ddp.exchange.thread import ThreadLane

Lane = ThreadLane | StreamLane


def open_lane(
    parent: dist.ProcessGroup, device: torch.device, wire_dtype: torch.dtype | None, sketch_size: int
) -> Lane:
    """Return the lane and its exchanges for buckets on this device; on the CPU a collective of parent."""
    wire_dtype = wire_dtype if parent.size() > 1 else None  # nothing travels
    return (ThreadLane if device.type == "cpu" else StreamLane)(parent, device, wire_dtype, sketch_size)


def at_end_of_backward(call: Callable[[], None]) -> bool:
    """Let autograd call when backward has ended, before DDP looks at any promise; false outside of backward.

    Outside is DDP's Join, which shadows the hook of a rank that ran out of inputs.
    """
    try:
        Variable._execution_engine.queue_callback(call)
    except RuntimeError:
        return False
    return True
