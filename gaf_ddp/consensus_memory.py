"""The rule without a threshold with a memory: ranks judged by their momenta, m ← 0.99 m + g.

One batch's distances are mostly noise, those of momenta are less so. Beside the rule of consensus.py, a step does
three things, all by matrices `(W, W)`, so that momenta may be sketches or slices of gradients, wherever they are:

- Momenta are kept relative to the consensus: the members' mean is taken off them, which no distance sees. So a
  rank that has no gradient now stays where it was among the others, fading, and is judged by that when it comes
  back; and float32 holds distances that are small beside what the ranks have in common.
- Momenta of ranks that are very far are drawn in, m_j ← mean + (m_j − mean) · 5/z_j if z_j > 5, so that a burst,
  however long its gradients, is over a horizon later. One that is not finite becomes the mean. The mean is that of
  the members without j.
- Ranks that turn their gradient's sign are found by the gradients' mean cosines (decay 0.98): where gradients
  average to little, momenta do not show it. The mean of two ranks goes over the steps in which both voted, stands
  still in others, and counts, other than as 0, from the 50th such step on.
"""

import math
from statistics import median_low
from typing import NamedTuple

import torch
from torch import Tensor

from gaf_ddp.consensus import average, judge, judge_few, lower_median, require_ratio
from gaf_ddp.device import on_host
from gaf_ddp.weighting import cosine, present

MOMENTUM = 0.99  # 0.97 to 0.995 do the same
_REACH = 5.0  # z beyond which momenta are drawn in
_DECAY, _STEPS = 0.98, 50  # of mean cosines, and the steps that two ranks share before theirs counts
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
    """What the rule remembers beside the momenta, which are the caller's: two matrices `(W, W)`.

    Args:
        ratio: largest z of a kept rank, above 1.
    """

    def __init__(self, ratio: float = 3.0) -> None:
        self.ratio = require_ratio(ratio)
        self._cosines: Tensor | None = None  # (2, W, W): decayed sums of the gradients' cosines, and their numbers

    def decide(self, momenta: Tensor, gradients: Tensor, voters: Tensor, remember: bool = True) -> Consensus:
        """Judge one step, and remember it if asked to; never waits for an accelerator.

        Args:
            momenta: `(W, W)`, Gramian of the momenta, this step's gradients in them, all exact or all sketched.
            gradients: `(W, W)`, Gramian of this step's gradients; may hold NaN and inf.
            voters: bool `(W,)`, whose gradients passed the guards.
            remember: whether this is the step's last decision.
        """
        if self._cosines is None or self._cosines.shape[1:] != momenta.shape:
            self._cosines = torch.zeros(2, *momenta.shape, dtype=torch.float64, device=momenta.device)
        few = on_host(momenta) and len(momenta) <= _FEW
        cosines, found = (_decide_few if few else _decide_many)(
            self._cosines.to(momenta.device), momenta, gradients, voters, self.ratio
        )
        if remember:
            self._cosines = cosines
        return found

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return a copy of what is remembered."""
        return {"cosines": None if self._cosines is None else self._cosines.clone()}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Restore it; what belongs to another world size is dropped at the next decision.

        Raises:
            ValueError: state is not what `state_dict` returns; nothing is changed then.
        """
        cosines: object = state.get("cosines", "nothing")
        if isinstance(cosines, Tensor):
            square = cosines.dim() == 3 and len(cosines) == 2 and cosines.shape[1] == cosines.shape[2]
            sound = square and cosines.dtype == torch.float64 and bool(cosines.isfinite().all())
        else:
            sound = cosines is None
        if not sound:
            raise ValueError(f"cosines must be None or finite numbers (2, W, W) in float64, found {cosines!r:.60}")
        self._cosines = state["cosines"]


def move(momenta: Tensor, moves: Tensor) -> Tensor:
    """Return `moves @ momenta` `(W, k)` in the momenta's dtype; rows that count nowhere may hold NaN.

    Computed in float64, as float32 products may silently use TF32.
    """
    counts = (moves != 0).any(0)[:, None]
    return (moves @ torch.where(counts, momenta, 0).double()).to(momenta.dtype)


def find_flipped(similarity: Tensor, voters: Tensor) -> Tensor:
    """Return whose mirror image would be a member by mean cosines `(W, W)`, bool `(W,)`.

    With a_j the (h−1)-th largest mean cosine of j with others, and q the lower median of a over the voters: where
    q > 0 and −2q ≤ a_j ≤ −q/2. No wider, as honest ranks with data of their own reach −7 q.
    """
    itself = torch.eye(len(voters), dtype=torch.bool, device=voters.device)
    order = torch.where(voters, similarity, -math.inf).masked_fill(itself, math.inf).sort(1, descending=True)
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
    cosines: Tensor, momenta: Tensor, gradients: Tensor, voters: Tensor, ratio: float
) -> tuple[Tensor, Consensus]:
    """Decide in tensors; return the new sums of cosines and what was decided."""
    pairs = voters[:, None] & voters[None, :]
    now = torch.stack([torch.where(pairs, cosine(gradients), 0), pairs.double()])
    cosines = cosines * torch.where(pairs, _DECAY, 1.0) + now
    flipped = find_flipped(torch.where(cosines[1] > _ENOUGH, cosines[0] / cosines[1], 0), voters)
    here, known = present(gradients), momenta.diagonal().isfinite()
    z, members = judge(momenta, voters)
    z = torch.where(here, z, math.nan)
    weights = average((z <= ratio) & ~flipped, voters)
    itself = torch.eye(len(voters), dtype=torch.float64, device=voters.device)
    everyone = members.double()
    without = everyone * (1 - itself)  # row j: the members without j; then means
    without, everyone = (m / m.sum(-1, keepdim=True).clamp(min=1) for m in (without, everyone))
    stays = torch.where(known, torch.where(z > _REACH, _REACH / z, 1), 0)[:, None]
    moves = stays * itself + (1 - stays) * without - (here | ~known)[:, None] * everyone
    return cosines, Consensus(weights, z, flipped, moves)


def _decide_few(
    cosines: Tensor, momenta: Tensor, gradients: Tensor, voters: Tensor, ratio: float
) -> tuple[Tensor, Consensus]:
    """Decide in plain numbers."""
    inner, product, ranks = momenta.tolist(), gradients.tolist(), range(len(voters))
    some = [i for i, votes in enumerate(voters.tolist()) if votes]
    total, number = cosines.tolist()
    for i in some:
        for j in some:
            total[i][j] = _DECAY * total[i][j] + _cosine(product, i, j)
            number[i][j] = _DECAY * number[i][j] + 1
    mean_cosines = [[total[i][j] / number[i][j] if number[i][j] > _ENOUGH else 0.0 for j in ranks] for i in ranks]
    flipped = find_flipped_few(mean_cosines, some)
    here = [math.isfinite(product[i][i]) and product[i][i] > 0 for i in ranks]
    z, members = judge_few(inner, some)
    z = [z[i] if here[i] else math.nan for i in ranks]
    kept = [i for i in some if z[i] <= ratio and i not in flipped] or some
    moves = [[0.0] * len(voters) for _ in ranks]
    for i in ranks:
        known = math.isfinite(inner[i][i])
        stays = (_REACH / z[i] if z[i] > _REACH else 1.0) if known else 0.0
        without = [j for j in members if j != i]
        moves[i][i] = stays
        for j in without:
            moves[i][j] = (1 - stays) / len(without)
        for j in members if here[i] or not known else []:
            moves[i][j] -= 1 / len(members)
    shares = [(i in kept) / max(len(kept), 1) for i in ranks]
    found = Consensus(_float64(shares), _float64(z), torch.tensor([i in flipped for i in ranks]), _float64(moves))
    return _float64([total, number]), found


def _cosine(product: list[list[float]], i: int, j: int) -> float:
    """Return one of weighting.py's `cosine`s, of two voters."""
    return max(-1.0, min(1.0, product[i][j] / math.sqrt(product[i][i] * product[j][j])))


def _float64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
