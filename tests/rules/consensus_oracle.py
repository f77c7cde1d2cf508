"""What the rule without a threshold must give, the slow and plain way: on explicit vectors in float64, no Gramian.

Every comparison is refused when it hangs on rounding, so that a test can only fail where the package is wrong.
"""

import math
from itertools import combinations
from statistics import median_low
from typing import NamedTuple

import torch
from torch import Tensor

from tests.oracle import present

MARGIN = 1e-6  # relative; from Gramians in float64, the tests' distances are good to about 1e-9
_LEAST = 1e-3  # least unit, in root mean square lengths of the members


class Judgement(NamedTuple):
    """z of all finite vectors by rank, and the members."""

    z: dict[int, float]
    members: list[int]


class Step(NamedTuple):
    """Who counts from now on, z (NaN where there is none) and the flipped ranks of one ballot."""

    kept: list[int]
    z: list[float]
    flipped: list[int]


class ConsensusOracle:
    """W ranks that are judged ballot by ballot, with the momenta `(W, n)` and every cosine that was.

    margin: relative, within which no comparison may be.
    """

    def __init__(
        self, world_size: int, size: int, ratio: float = 3.0, momentum: float = 0.99, margin: float = MARGIN
    ) -> None:
        self.momenta = torch.zeros(world_size, size, dtype=torch.float64)
        self.mean = torch.zeros(size, dtype=torch.float64)  # of the members' momenta
        self.kept = list(range(world_size))
        self.cosines: dict[tuple[int, int], list[tuple[float, int]]] = {}  # and of how many steps each is
        self._ratio, self._momentum, self._margin = ratio, momentum, margin

    def step(self, gradients: Tensor, steps: int = 1) -> Step:
        """Judge gradients `(W, n)`, sums over so many steps, and change the momenta as the rule says."""
        gradients, decay = gradients.double(), self._momentum**steps
        ranks, voters = range(len(gradients)), present(list(gradients), None)
        before, self.momenta = self.momenta, decay * self.momenta
        self.momenta[voters] += gradients[voters]
        for i, j in combinations(voters, 2):
            cosine = gradients[i] @ gradients[j] / (gradients[i].norm() * gradients[j].norm())
            self.cosines.setdefault((i, j), []).append((cosine.item(), steps))
        # Relative to the mean: all distances are the same, but the least unit is one of present lengths.
        found = judge(list(self.momenta - decay * self.mean), voters, self._margin)
        z = [found.z.get(i, math.nan) if i in voters else math.nan for i in ranks]
        flipped = self._flipped(voters)
        assert all(_clear(z[i], limit, self._margin) for i in voters for limit in (self._ratio, 5.0))
        good = [i for i in ranks if (z[i] <= self._ratio if i in voters else i in self.kept) and i not in flipped]
        if set(good) & set(voters):
            self.kept = good
        self._change(before, decay, z, found.members, voters)
        return Step(self.kept, z, flipped)

    def _flipped(self, voters: list[int]) -> list[int]:
        if len(voters) < 2:
            return []
        h = len(voters) // 2 + 1
        a = {i: sorted((self._mean_cosine(i, j) for j in voters if j != i), reverse=True)[h - 2] for i in voters}
        q = median_low(a.values())
        assert q <= 0 or all(_clear(a[i], limit, self._margin) for i in voters for limit in (-2 * q, -q / 2))
        return [i for i in voters if q > 0 and -2 * q <= a[i] <= -q / 2]

    def _mean_cosine(self, i: int, j: int) -> float:
        """Return the mean over all steps that both shared, as if each had had its ballot's cosine."""
        by_step = [cosine for cosine, steps in self.cosines[min(i, j), max(i, j)] for _ in range(steps)]
        if len(by_step) < 50:
            return 0.0
        weights = [0.98**age for age in reversed(range(len(by_step)))]
        return sum(c * w for c, w in zip(by_step, weights, strict=True)) / sum(weights)

    def _change(self, before: Tensor, decay: float, z: list[float], members: list[int], voters: list[int]) -> None:
        """Let the absent keep their difference to the mean, fading, and draw in the far."""
        now, old_mean = self.momenta.clone(), self.mean
        self.mean = now[members].mean(0) if members else decay * old_mean
        for i, momentum in enumerate(now):
            if i not in voters:
                self.momenta[i] = self.mean + decay * (before[i] - old_mean)
            elif z[i] > 5:
                mean = now[[j for j in members if j != i]].mean(0)
                self.momenta[i] = mean + (momentum - mean) * 5 / z[i]


def judge(vectors: list[Tensor], voters: list[int], margin: float = MARGIN) -> Judgement:
    """Return z of all finite vectors, and the members among the voters."""
    known = [i for i, v in enumerate(vectors) if v.isfinite().all()]
    voters = [i for i in voters if i in known]
    if not voters:
        return Judgement({}, [])
    h = len(voters) // 2 + 1
    distance = {i: {j: (vectors[i] - vectors[j]).norm().item() for j in voters} for i in known}
    nearest = {i: sorted(distance[i][j] for j in voters if j != i)[: h - 1] or [0.0] for i in voters}
    best = min(nearest[i][-1] for i in voters)
    assert all(_tied_or_clear(nearest[i][-1], best, margin) for i in voters)
    candidates = [i for i in voters if nearest[i][-1] == best]
    spread = {i: sum(d**2 for d in nearest[i]) for i in candidates}
    candidates = [i for i in candidates if spread[i] <= min(spread.values()) * (1 + margin)]
    assert all(_tied_or_clear(distance[i][j], best, margin) for i in candidates for j in voters)
    members = [[j for j in voters if distance[i][j] <= best] for i in candidates]
    assert all(m == members[0] for m in members), "a tie that rounding would break: choose other gradients"

    def far(j: int) -> float:
        others = [vectors[a] for a in members[0] if a != j]
        if not others:
            return 0.0
        mean = torch.stack(others).mean(0)
        return float((vectors[j] - mean).norm()) / math.sqrt(1 + 1 / len(others))

    length = math.sqrt(sum(vectors[a].norm().item() ** 2 for a in members[0]) / len(members[0]))
    unit = max(median_low([far(a) for a in members[0]]), _LEAST * length)
    return Judgement({j: far(j) / unit if unit else 0.0 for j in (known if len(voters) > 1 else voters)}, members[0])


def kept_by(vectors: list[Tensor], voters: list[int], ratio: float) -> list[int]:
    """Return the ranks that the rule without a memory keeps."""
    z = judge(vectors, voters).z
    assert all(_clear(z[i], ratio, MARGIN) for i in voters if i in z)
    return [i for i in voters if i in z and z[i] <= ratio] or voters


def _clear(value: float, limit: float, margin: float) -> bool:
    """Return whether it is clear on which side of the limit a value is; else choose other gradients."""
    return math.isnan(value) or abs(value - limit) > margin * abs(limit)


def _tied_or_clear(value: float, limit: float, margin: float) -> bool:
    """Return whether a value is a limit, as distances of copies are, or clear of it."""
    return value == limit or _clear(value, limit, margin)
