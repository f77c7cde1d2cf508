"""The rule without a threshold with a memory: ranks judged by their momenta, m ← 0.99 m + g.

One batch's distances are mostly noise, those of momenta are less so. Beside the rule of consensus.py, a step does
three things, all by matrices `(W, W)`, so that momenta may be sketches or slices of gradients, on any rank:

- It draws in the momenta of ranks that are very far, m_j ← mean + (m_j − mean) · 5/z_j if z_j > 5, so that a
  burst, however long its gradients, is over a horizon later. A momentum that is not finite becomes the mean. The
  mean is that of the members, without j, which j was held against.
- It credits ranks that have no gradient now with the consensus's, m_j ← m_j + mean · (1 − 0.99); at first more, as
  a gradient is a larger part of momenta. So their distance fades with their momentum: it neither grows while they
  are away nor is forgotten at once.
- It finds ranks that turn their gradient's sign, by the gradients' mean cosines (decay 0.98): where gradients
  average to little, momenta do not show it. The mean of two ranks goes over the steps in which both voted, stands
  still in others, and counts, other than as 0, from the 50th such step on.
"""

import math
from statistics import median_low
from typing import NamedTuple

import torch
from torch import Tensor

from gaf_ddp.consensus import average, judge, judge_few, lower_median, require_ratio
from gaf_ddp.gramian import on_host
from gaf_ddp.weighting import cosine, present

MOMENTUM = 0.99  # 0.97 to 0.995 do the same
_REACH = 5.0  # z beyond which momenta are drawn in
_DECAY, _STEPS = 0.98, 50  # of mean cosines, and how many steps make one
_ENOUGH = (1 - _DECAY ** (_STEPS - 0.5)) / (1 - _DECAY)  # their decayed number, less half a step for rounding
_FEW = 16  # ranks; the time in plain numbers grows with their square


class Consensus(NamedTuple):
    """What one decision over W ranks says.

    Attributes:
        weights: `(W,)` float64, each rank's share of the result; sum to 1, or all 0 where nobody votes.
        z: `(W,)` float64, distance to the consensus in its members' median distance; NaN where there is no
            gradient now, no finite momentum, or nobody to be compared with.
        flipped: bool `(W,)`, left out since its mirror image would be a member.
        moves: `(W, W)` float64, to be taken to the momenta (`move`) before the next gradients are added.
    """

    weights: Tensor
    z: Tensor
    flipped: Tensor
    moves: Tensor


class ConsensusMemory:
    """What the rule remembers beside the momenta, which are the caller's: two matrices `(W, W)` and a number.

    Args:
        ratio: largest z of a kept rank, above 1.
    """

    def __init__(self, ratio: float = 3.0) -> None:
        self.ratio = require_ratio(ratio)
        self._cosines: Tensor | None = None  # (2, W, W): decayed sums of the gradients' cosines, and their numbers
        self._steps: Tensor | None = None  # (): decayed number of steps, of which a momentum is the sum

    def decide(self, momenta: Tensor, gradients: Tensor, voters: Tensor, remember: bool = True) -> Consensus:
        """Judge one step, and remember it if asked to; never waits for an accelerator.

        Args:
            momenta: `(W, W)`, Gramian of the momenta, this step's gradients in them, all exact or all sketched.
            gradients: `(W, W)`, Gramian of this step's gradients; may hold NaN and inf.
            voters: bool `(W,)`, whose gradients passed the guards.
            remember: whether this is the step's last decision.
        """
        if self._cosines is None or self._steps is None or self._cosines.shape[1:] != momenta.shape:
            self._cosines = torch.zeros(2, *momenta.shape, dtype=torch.float64, device=momenta.device)
            self._steps = self._cosines.new_zeros(())
        few = on_host(momenta) and len(momenta) <= _FEW
        before = self._cosines.to(momenta.device), self._steps.to(momenta.device)
        *after, found = (_decide_few if few else _decide_many)(*before, momenta, gradients, voters, self.ratio)
        if remember:
            self._cosines, self._steps = after
        return found

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return a copy of what is remembered."""
        memory = {"cosines": self._cosines, "steps": self._steps}
        return {name: None if value is None else value.clone() for name, value in memory.items()}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Restore it; what belongs to another world size is dropped at the next decision."""
        self._cosines, self._steps = state["cosines"], state["steps"]


def move(momenta: Tensor, moves: Tensor) -> Tensor:
    """Return the momenta `(W, k)` moved, `moves @ momenta`; rows that count nowhere may hold NaN.

    Computed in float64, as float32 products may silently use TF32: momenta that nobody moves keep their bits.
    """
    counts = (moves != 0).any(0)[:, None]
    return (moves @ torch.where(counts, momenta, 0).double()).to(momenta.dtype)


def find_flipped(similarity: Tensor, voters: Tensor) -> Tensor:
    """Return whose mirror image would be a member by mean cosines `(W, W)`, bool `(W,)`.

    With a_j the (h−1)-th largest mean cosine of j with others, and q the lower median of a over the voters: where
    q > 0 and −2q ≤ a_j ≤ −q/2. No wider, as honest ranks with data of their own reach −7 q.
    """
    self_pairs = torch.eye(len(voters), dtype=torch.bool, device=voters.device)
    order = torch.where(voters, similarity, -math.inf).masked_fill(self_pairs, math.inf).sort(1, descending=True)
    a = order.values.index_select(1, (voters.sum() // 2).view(1)).squeeze(1)
    q = lower_median(a, voters)
    return voters & (q > 0) & (-2 * q <= a) & (a <= -q / 2)


def find_flipped_few(similarity: list[list[float]], voters: list[int]) -> list[int]:
    """Return the same in plain numbers, as ranks."""
    if len(voters) < 2:
        return []
    others = {i: sorted((similarity[i][j] for j in voters if j != i), reverse=True) for i in voters}
    a = {i: others[i][len(voters) // 2 - 1] for i in voters}
    q = median_low(a.values())
    return [i for i in voters if q > 0 and -2 * q <= a[i] <= -q / 2]


def _decide_many(
    cosines: Tensor, steps: Tensor, momenta: Tensor, gradients: Tensor, voters: Tensor, ratio: float
) -> tuple[Tensor, Tensor, Consensus]:
    """Decide in tensors; returns the new memory and what was decided."""
    pairs = voters[:, None] & voters[None, :]
    now = torch.stack([torch.where(pairs, cosine(gradients), 0), pairs.double()])
    cosines = cosines * torch.where(pairs, _DECAY, 1.0) + now
    steps = MOMENTUM * steps + voters.any()
    here, known = present(gradients), momenta.diagonal().isfinite()
    z, members = judge(momenta, voters)
    z = torch.where(here, z, math.nan)
    flipped = find_flipped(torch.where(cosines[1] > _ENOUGH, cosines[0] / cosines[1], 0), voters)
    weights = average((z <= ratio) & ~flipped, voters & known)
    own = torch.where(known, torch.where(z > _REACH, _REACH / z, 1), 0)
    credit = torch.where(known & ~here, 1 / steps.clamp(min=1), 0)
    self_pairs = torch.eye(len(voters), dtype=momenta.dtype, device=momenta.device).double()
    held = members * (1 - self_pairs)  # row j: the mean that j was held against
    held = held / held.sum(1, keepdim=True).clamp(min=1)
    moves = own[:, None] * self_pairs + (1 - own + credit)[:, None] * held
    return cosines, steps, Consensus(weights, z, flipped, moves)


def _decide_few(
    cosines: Tensor, steps: Tensor, momenta: Tensor, gradients: Tensor, voters: Tensor, ratio: float
) -> tuple[Tensor, Tensor, Consensus]:
    """Decide in plain numbers."""
    inner, product, ranks = momenta.tolist(), gradients.tolist(), range(len(voters))
    some = [i for i, votes in enumerate(voters.tolist()) if votes]
    total, number = cosines.tolist()
    for i in some:
        for j in some:
            total[i][j] = _DECAY * total[i][j] + _cosine(product, i, j)
            number[i][j] = _DECAY * number[i][j] + 1
    shared = MOMENTUM * steps.item() + bool(some)
    here = [math.isfinite(product[i][i]) and product[i][i] > 0 for i in ranks]
    z, members = judge_few(inner, some)
    z = [z[i] if here[i] else math.nan for i in ranks]
    mean_cosines = [[total[i][j] / number[i][j] if number[i][j] > _ENOUGH else 0.0 for j in ranks] for i in ranks]
    flipped = find_flipped_few(mean_cosines, some)
    some = [i for i in some if math.isfinite(inner[i][i])]
    kept = [i for i in some if z[i] <= ratio and i not in flipped] or some
    moves = [[0.0] * len(voters) for _ in ranks]
    for i in ranks:
        known = math.isfinite(inner[i][i])
        own = (_REACH / z[i] if z[i] > _REACH else 1.0) if known else 0.0
        mean = 1 - own + (1 / max(shared, 1.0) if known and not here[i] else 0.0)
        held = [j for j in members if j != i]
        for j in held:
            moves[i][j] = mean / len(held)
        moves[i][i] = own
    memory, numbers = torch.tensor([total, number], dtype=torch.float64), torch.tensor(z, dtype=torch.float64)
    weights = torch.tensor([(i in kept) / max(len(kept), 1) for i in ranks], dtype=torch.float64)
    turned, moved = torch.tensor([i in flipped for i in ranks]), torch.tensor(moves, dtype=torch.float64)
    return memory, torch.tensor(shared, dtype=torch.float64), Consensus(weights, numbers, turned, moved)


def _cosine(product: list[list[float]], i: int, j: int) -> float:
    """Return one of weighting.py's `cosine`s, of two voters."""
    return max(-1.0, min(1.0, product[i][j] / math.sqrt(product[i][i] * product[j][j])))
