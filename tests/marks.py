"""Marks for parameters."""

from collections.abc import Iterable
from typing import Any

import pytest


def job_but(*quick: Any, of: Iterable[Any]) -> list[Any]:
    """Return the parameters `of` a test, all but the `quick` ones marked `job`; tuples are for several names."""
    values = [(value, value if isinstance(value, tuple) else (value,)) for value in of]
    return [value if value in quick else pytest.param(*each, marks=pytest.mark.job) for value, each in values]
