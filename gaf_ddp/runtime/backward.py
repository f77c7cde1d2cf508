"""Where autograd is."""

from collections.abc import Callable

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
