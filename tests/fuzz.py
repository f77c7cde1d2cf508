"""What fuzzing draws: W gradients of any kind, length, dtype and scale, and how many examples of them.

CI draws the same few every time. `GAF_DDP_FUZZ=5000` draws that many new ones for every test in place of them.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, reject, settings
from hypothesis import strategies as st
from torch import Tensor

_MANY = int(os.environ.get("GAF_DDP_FUZZ", "0"))

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Powers of ten that a gradient's elements may have, so that neither they nor sums of 20 leave the dtype.
_EXPONENTS = {torch.float16: (-4, 2)}
_ANY_EXPONENT = (-30, 30)
LENGTHS = (0, 1, 2, 3, 7, 33, 64, 100, 400, 1000)
# Most are plain; of the others some are absent, some tie, and some hang on the edges of a dtype.
_KINDS = (
    *["plain"] * 9,
    "copy",
    "copy",
    "negated",
    "zeros",
    "nan",
    "inf",
    "-inf",
    "denormal",
    "one",
    "far",
    "tenfold",
)


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """Return a decorator: so many examples, the same ones every time, or as many new ones as were asked for."""
    return settings(
        max_examples=_MANY or examples,
        derandomize=not _MANY,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],
        # An oracle refuses what hangs on rounding.
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Drawn(NamedTuple):
    """Rows `(W, n)` and what they were made from, which a failure shows in their place."""

    rows: Tensor
    recipe: str

    def __repr__(self) -> str:
        """Return the recipe."""
        return self.recipe


@st.composite
def gradients(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    lengths: tuple[int, ...] = LENGTHS,
    kinds: tuple[str, ...] = _KINDS,
) -> Drawn:
    """Return W gradients, 1 to 20."""
    dtype, length = draw(st.sampled_from(dtypes)), draw(st.sampled_from(lengths))
    exponent = draw(st.integers(*_EXPONENTS.get(dtype, _ANY_EXPONENT)))
    common = draw(st.sampled_from([0.0, 0.3, 1.0, 10.0]))
    kinds_drawn = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=20))
    seed = draw(st.integers(0, 2**16))
    rows = make(kinds_drawn, length, dtype, exponent, common, seed)
    recipe = f"make({kinds_drawn}, {length}, {dtype}, exponent={exponent}, common={common}, seed={seed})"
    return Drawn(rows, recipe)


def make(
    kinds: list[str], length: int, dtype: torch.dtype, exponent: int = 0, common: float = 1.0, seed: int = 0
) -> Tensor:
    """Return gradients of these kinds, about `10^exponent` long an element, with so much in common."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(length, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(kinds), length, generator=generator, dtype=torch.float64)
    # Wide of each other and of guards: a norm exactly ten medians long would hang on rounding.
    strength = 0.5 + torch.rand(len(kinds), 1, generator=generator, dtype=torch.float64)
    rows = ((common * direction + noise) * strength * 10.0**exponent).to(dtype)
    low, high = _EXPONENTS.get(dtype, _ANY_EXPONENT)
    smallest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).smallest_normal
    for i, kind in enumerate(kinds if length else []):
        other = int(torch.randint(i + 1, (), generator=generator))
        place = int(torch.randint(length, (), generator=generator))
        away = int(torch.randint(low - exponent, high - exponent + 1, (), generator=generator))
        if kind == "copy":
            rows[i] = rows[other]
        elif kind == "negated":
            rows[i] = -rows[other]
        elif kind == "zeros":
            rows[i] = 0
        elif kind in ("nan", "inf", "-inf"):
            rows[i, place] = float(kind)
        elif kind == "denormal":
            rows[i] = (noise[i].sign() * smallest / 8).to(dtype)
        elif kind == "one":
            rows[i] = 0
            rows[i, place] = 10.0**exponent
        elif kind == "far":
            rows[i] = (rows[i].double() * 10.0**away).to(dtype)
        elif kind == "tenfold":
            rows[i] = (rows[i].double() * 10).to(dtype)
    return rows


def unless_rounding_decides(expected: Callable[[], Any]) -> Any:
    """Return what an oracle expects; have another example drawn if it refuses this one."""
    try:
        return expected()
    except AssertionError:
        reject()


def clear_of_the_guard(rows: Tensor, ratio: float | None) -> bool:
    """Return whether no norm is so near to ratio lower medians that rounding decides."""
    norms = sorted(row.double().norm().item() for row in rows if row.isfinite().all() and row.any())
    if ratio is None or not norms:
        return True
    limit = ratio * norms[(len(norms) - 1) // 2]
    return all(abs(norm / limit - 1) > 1e-4 for norm in norms)
