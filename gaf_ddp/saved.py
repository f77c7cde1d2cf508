"""What a saved GAFState must look like before anything of it is taken."""

from collections.abc import Sequence
from typing import Any

from gaf_ddp.settings import require

VERSION = 2  # of what GAFState.state_dict returns
_KEYS = ["memory", "meter", "standing", "step", "version"]


def require_saved(state_dict: Any) -> None:
    """Raise ValueError unless this is a state dict of `GAFState`, as far as it can be seen from outside."""
    found = state_dict.get("version", VERSION) if isinstance(state_dict, dict) else VERSION
    require(found == VERSION, f"state_dict's version must be {VERSION}", found)
    keys = set(state_dict) if isinstance(state_dict, dict) else state_dict
    require(keys == set(_KEYS), f"state_dict must hold {_KEYS}", keys)
    step, memory = state_dict["step"], state_dict["memory"]
    require(type(step) is int and step >= 0, "state_dict's step must be an integer >= 0", step)
    require(isinstance(memory, bytes), "state_dict's memory must be bytes", memory)


def require_numbers(name: str, state: Any, by_rank: Sequence[str], in_all: Sequence[str]) -> None:
    """Raise ValueError unless state holds lists of numbers: one per rank, or one in all, or none at all."""
    names = (*by_rank, *in_all)
    sound = isinstance(state, dict) and set(state) == set(names)
    sound = sound and all(isinstance(numbers, list) for numbers in state.values())
    count = len(state[by_rank[0]]) if sound else 0
    expected = [count] * len(by_rank) + [min(count, 1)] * len(in_all)
    sound = sound and [len(state[name]) for name in names] == expected
    sound = sound and all(type(number) in (int, float) for numbers in state.values() for number in numbers)
    require(sound, f"{name} must hold lists of numbers as state_dict() returns them", state)
