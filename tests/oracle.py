"""What the method must give, the slow and plain way: on explicit vectors in float64, without a Gramian.

Every comparison is refused when it hangs on rounding, so that a test can only fail where the package is wrong.
"""

import math
from collections.abc import Callable, Sequence
from statistics import median_high
from typing import NamedTuple

import torch
from torch import Tensor

# Float32 gradients of the tests' sizes have cosines good to about 1e-6: nearer calls are the test's own mistake.
_MARGIN = 1e-4
_CANCELLED = 0.05  # of the longest: a sum so short has a direction that is mostly rounding


class Outcome(NamedTuple):
    """The ranks kept, in rank order, and the filtered gradient (zeros where nothing agreed)."""

    kept: list[int]
    gradient: Tensor


Rule = Callable[[list[Tensor]], Outcome]


def filtered(gradients: Sequence[Tensor], rule: Rule, max_norm_ratio: float | None = 10.0) -> Outcome:
    """Return what a group whose ranks have these gradients must get: absent ranks out, the rule for the rest."""
    vectors = [g.double().flatten() for g in gradients]
    voters = present(vectors, max_norm_ratio)
    if not voters and not all(v.isfinite().all() for v in vectors):
        return Outcome([], torch.full_like(vectors[0], math.nan))
    if not voters:
        return Outcome([], torch.zeros_like(vectors[0]))
    kept, gradient = rule([vectors[i] for i in voters])
    if len(voters) > 1 and len(kept) < 2:
        return Outcome([], torch.zeros_like(gradient))
    return Outcome([voters[i] for i in kept], gradient)


def present(vectors: list[Tensor], max_norm_ratio: float | None) -> list[int]:
    """Return the ranks whose gradient is finite, not zero and not too long."""
    norms = {i: v.norm().item() for i, v in enumerate(vectors) if v.isfinite().all() and v.any()}
    if not norms or max_norm_ratio is None:
        return list(norms)
    median = median_high(norms.values())
    return [i for i, norm in norms.items() if norm <= max_norm_ratio * median]


def mean(vectors: list[Tensor]) -> Outcome:
    """Average everything."""
    return Outcome(list(range(len(vectors))), torch.stack(vectors).mean(0))


def neighborhood(tau: float) -> Rule:
    """Return the rule of tau: the gradient with the most others within tau, and those, averaged."""

    def rule(vectors: list[Tensor]) -> Outcome:
        near = [[j for j, v in enumerate(vectors) if j == i or _close(u, v, tau)] for i, u in enumerate(vectors)]
        spread = [sum(_distance(vectors[i], vectors[j]) for j in near[i]) for i in range(len(vectors))]
        most = max(map(len, near))
        best = min(spread[i] for i in range(len(vectors)) if len(near[i]) == most)
        centres = [i for i in range(len(vectors)) if len(near[i]) == most and spread[i] <= best + _MARGIN]
        kept = near[centres[0]]
        clear = most == 1 or all(near[i] == kept for i in centres)
        assert clear, "a tie that rounding would break: choose other gradients"
        return Outcome(kept, torch.stack([vectors[i] for i in kept]).mean(0))

    return rule


def sequential(tau: float, running: str = "mean") -> Rule:
    """Return the paper's rule, or with "half" the authors' code."""

    def rule(vectors: list[Tensor]) -> Outcome:
        kept, v = [0], vectors[0]
        for i, g in enumerate(vectors[1:], start=1):
            longest = max(vectors[j].norm() for j in kept)
            assert v.norm() * len(kept) > _CANCELLED * longest, "what is kept cancels out: choose other gradients"
            if _close(v, g, tau):
                v = (v + g) / 2 if running == "half" else (len(kept) * v + g) / (len(kept) + 1)
                kept.append(i)
        return Outcome(kept, v)

    return rule


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Assert that the relative error of a gradient, as a vector, is small; zeros and NaN must be exact."""
    result, expected = result.double().flatten().cpu(), expected.double()
    if expected.isnan().any():
        assert expected.isnan().all()
        assert result.isnan().all()
    else:
        error = (result - expected).norm().item()
        assert error <= tolerance * expected.norm().item(), f"off by {error} of {expected.norm().item()}"


def _distance(u: Tensor, v: Tensor) -> float:
    return 1 - float(u @ v / (u.norm() * v.norm()))


def _close(u: Tensor, v: Tensor, tau: float) -> bool:
    distance = _distance(u, v)
    exact = tau in (0.0, 2.0) or torch.equal(u, v)
    assert exact or abs(distance - tau) > _MARGIN, f"distance {distance} hangs on rounding: choose other gradients"
    return distance <= tau + _MARGIN
