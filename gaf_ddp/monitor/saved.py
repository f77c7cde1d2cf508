"""What saved numbers must look like before anything of them is taken."""

import math
from collections.abc import Sequence
from typing import Any

from gaf_ddp.settings import require


def require_numbers(name: str, state: Any, by_rank: Sequence[str], in_all: Sequence[str]) -> None:
    """Raise ValueError unless state holds lists of finite numbers: one per rank, or one in all, or none at all."""
    names = (*by_rank, *in_all)
    sound = isinstance(state, dict) and set(state) == set(names)
    sound = sound and all(isinstance(numbers, list) for numbers in state.values())
    count = len(state[by_rank[0]]) if sound else 0
    expected = [count] * len(by_rank) + [min(count, 1)] * len(in_all)
    sound = sound and [len(state[name]) for name in names] == expected
    numbers = [number for each in state.values() for number in each] if sound else []
    sound = sound and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    require(sound, f"{name} must hold lists of finite numbers as state_dict() returns them", state)
