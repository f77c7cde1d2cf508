"""Where autograd is."""

from collections.abc import Callable

import torch
from torch.autograd import Variable


def at_end_of_backward(call: Callable[[], None]) -> bool:
    """Let autograd call when backward has ended, before DDP looks at any future; false outside of backward.

    Outside is DDP's Join, which shadows the hook of a rank that ran out of inputs.
    """
    try:
        Variable._execution_engine.queue_callback(call)
    except RuntimeError:
        return False
    return True


def number_of_backward() -> int | None:
    """Return which backward is running in this thread, None outside of one."""
    number: int = torch._C._current_graph_task_id()
    return None if number == -1 else number
