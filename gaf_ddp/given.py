"""What users give to more than one function: a state and a process group, and what these must be."""

import torch.distributed as dist

from gaf_ddp.state import GAFState


def require_state(state: object) -> None:
    """Raise TypeError unless it is a GAFState."""
    if not isinstance(state, GAFState):
        raise TypeError(f"state must be a GAFState, found {type(state).__name__}")


def require_new(state: GAFState) -> None:
    """Raise ValueError if it filters a model already."""
    if state._way is not None:
        raise ValueError("state must be new, found one that filters a model already: make a GAFState for each model")


def group_of(state: GAFState, given: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group that is given, the state's or the default one, which is the state's from now on.

    Raises:
        ValueError: there is none, the state has another, or it is none of torch.distributed's.
    """
    ours = state.process_group
    if ours is not None and given is not None and ours.group_name != given.group_name:
        raise ValueError(f"process_group must be the state's, {ours.group_name!r}, found {given.group_name!r}")
    group = or_default(given or ours)
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        rule = "process_group must be one of torch.distributed, with torchft see gaf_ddp.torchft"
        raise ValueError(f"{rule}, found a {type(group).__module__}.{type(group).__name__}") from None
    if ours is None:
        state.process_group = group
    return group


def or_default(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group, or the default one in its place; ValueError if there is none."""
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("process_group is None and there is no default group: call init_process_group first")
    return group
