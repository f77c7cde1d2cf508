"""Held-out data as a witness: which ranks' gradients lower the loss on data that everyone trusts, and which raise it.

Distance to the consensus cannot tell an honest rank that alone has data of its own from a bad one, nor find a bad
majority. The gradient of the loss on a few held-out examples can. It is read twice, as it is and with the logits
divided by 2. For wrong labels may lower the held-out loss of an over-confident model, but only by shrinking its logits.
With v and v' the two readings, and S_j the sum of voter j's gradients since the last ones,

    c = cos(S_j, v), c' = cos(S_j, v')    r, r' = each minus its mean over the other voters that are in
    in :  D_j ← max(0, D_j + min(0.4, −max(c, r, c', r') − h))   condemned at D_j ≥ f_j
    out:  U_j ← max(0, U_j + min(0.4, min(c, r, c', r') − k))    trusted at U_j ≥ 0.5

D is `against`, U `in_favour`, f `demand` below. k = 0.2, and 0.4 for a voter that was condemned before. h = 0.1. While
the held-out loss falls, h = 0.4 for trusted voters; and for all, if no voter has a verdict.

Where the mix of ranks is right, v is noise, and cosines scatter around 0; where it is wrong they are large. So a
verdict needs evidence that adds up, from two readings at least. A reading counts only if the ranks' shares of it agree.
Where honest ranks that differ balance each other, v is noise too, but its cosines with all of them are large.

A verdict stands until the opposite is shown. Trust ends where the consensus keeps the voter anyway, and where the
held-out loss, at the second temperature, has doubled since. A verdict is revoked if that loss is 5 % larger at the next
reading; the verdict before it holds again then. f_j starts at 1, and doubles with each condemnation that was revoked.
While a voter is out its D stands still, while it is in its U does; both are 0 after a verdict.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = 1.0, 2.0  # by which logits are divided in the two readings
REACH = 3.0  # median norms, to which a trusted voter's gradient is shortened: a rank that was out has a long one
TRUSTED, CONDEMNED = 1.0, -1.0

_AGAINST, _FOR, _MOST = 1.0, 0.5, 0.4  # evidence for a verdict, and the most that one reading adds
_IN, _IN_WHILE_WELL, _OUT, _OUT_ONCE_CONDEMNED = 0.1, 0.4, 0.2, 0.4  # what cosines must exceed to be evidence
_SIGNAL = 0.2  # of a reading, the least part that shares must have in common
_FALLS, _WORSE, _MUCH_WORSE = 0.98, 1.05, 2.0  # ratios of the held-out loss: to the last reading's, to a verdict's


class Reading(NamedTuple):
    """One reading of held-out data, on the host.

    Attributes:
        cosines: `(2, V)` float64, c and c' of each voter; NaN where it had no gradient since the last reading.
        signal: `(2,)` float64, what part of v and v' the ranks' shares have in common.
        loss: the mean over the ranks, at the second temperature.
    """

    cosines: Tensor
    signal: Tensor
    loss: float


class Evidence(NamedTuple):
    """What speaks for and against V voters, each `(V,)` float64 on the host.

    Attributes:
        verdict: `TRUSTED`, `CONDEMNED` or 0.
        former: the one before it.
        against: D.
        in_favour: U.
        demand: f.
        suspect: 1 where it was condemned before.
        loss: the held-out loss when the verdict was given.
        age: readings since then.
        last_loss: that of the last reading, the same for all.
    """

    verdict: Tensor
    former: Tensor
    against: Tensor
    in_favour: Tensor
    demand: Tensor
    suspect: Tensor
    loss: Tensor
    age: Tensor
    last_loss: Tensor


class ReferenceMemory:
    """The evidence of one state: None before the first reading."""

    def __init__(self) -> None:
        self.evidence: Evidence | None = None

    def weigh(self, reading: Reading, kept: Tensor) -> None:
        """Take in a reading, given who counted in the steps before it, bool `(V,)`."""
        held = self.evidence
        if held is None or len(held.verdict) != len(kept):
            held = _no_evidence(len(kept))
        held, kept = _revoke(held, reading.loss, kept)
        cosines = reading.cosines
        if not bool((reading.signal >= _SIGNAL).all()):
            cosines = torch.zeros_like(cosines)
        both = torch.cat([cosines, cosines - _mean_of_others(cosines, kept)])
        known = both.isfinite().all(0)
        spared = (reading.loss < _FALLS * held.last_loss) & ((held.verdict == TRUSTED) | ~held.verdict.any())
        harm = -both.amax(0) - _either(spared, _IN_WHILE_WELL, _IN)
        good = both.amin(0) - _either(held.suspect > 0, _OUT_ONCE_CONDEMNED, _OUT)
        self.evidence = _judge(
            held._replace(
                against=torch.where(known & kept, _added(held.against, harm), held.against),
                in_favour=torch.where(known & ~kept, _added(held.in_favour, good), held.in_favour),
                last_loss=torch.full_like(held.last_loss, reading.loss)
                if math.isfinite(reading.loss)
                else held.last_loss,
            ),
            kept,
        )

    def keep(self, good: Tensor, z: Tensor, ratio: float) -> Tensor:
        """Return who counts, bool `(V,)`: the trusted, and of those without a verdict whom the consensus keeps.

        Args:
            good: bool `(V,)`, whom the consensus keeps.
            z: `(V,)` float64, distance to it; NaN where it is not known.
            ratio: largest z of whom it keeps. Trust ends there.
        """
        if self.evidence is None or len(self.evidence.verdict) != len(good):
            return good
        verdict = self.evidence.verdict
        verdict = torch.where((verdict == TRUSTED) & (z <= ratio), 0, verdict)
        self.evidence = self.evidence._replace(verdict=verdict)
        return (verdict == TRUSTED) | ((verdict == 0) & good)

    def dump(self) -> Tensor:
        """Return the evidence as one matrix, a row for each of its fields; of no voters where there is none."""
        return torch.stack(self.evidence or _no_evidence(0))

    def load(self, held: Tensor) -> None:
        """Restore what `dump` returned."""
        self.evidence = Evidence(*held.clone()) if held.shape[1] else None


def _no_evidence(count: int) -> Evidence:
    none = torch.zeros(count, dtype=torch.float64)
    return Evidence(none, none, none, none, none + 1, none, none, none, none)


def _revoke(held: Evidence, loss: float, kept: Tensor) -> tuple[Evidence, Tensor]:
    """Revoke verdicts that raised the held-out loss; return the evidence, and who is in, bool `(V,)`."""
    fresh = held.age == 0
    worse = (held.verdict != 0) & (loss > _either(fresh, _WORSE, _MUCH_WORSE) * held.loss)
    worse = worse & (fresh | (held.verdict == TRUSTED))
    demand = torch.where(worse & (held.verdict == CONDEMNED), 2 * held.demand, held.demand)
    now_in = torch.where(worse, held.verdict == CONDEMNED, kept)
    former = torch.where(fresh, held.former, 0)
    verdict = torch.where(worse, former, held.verdict)
    return held._replace(verdict=verdict, demand=demand, age=held.age + 1), now_in


def _judge(held: Evidence, kept: Tensor) -> Evidence:
    """Give the verdicts that the evidence is enough for, given who is in, bool `(V,)`."""
    condemned = kept & (held.against >= held.demand * _AGAINST) & (held.verdict != CONDEMNED)
    trusted = ~kept & (held.in_favour >= _FOR) & (held.verdict != TRUSTED)
    fresh = condemned | trusted
    return held._replace(
        verdict=torch.where(condemned, CONDEMNED, torch.where(trusted, TRUSTED, held.verdict)),
        former=torch.where(fresh, held.verdict, held.former),
        against=torch.where(fresh, 0, held.against),
        in_favour=torch.where(fresh, 0, held.in_favour),
        demand=torch.where(trusted & (held.verdict == CONDEMNED), 2 * held.demand, held.demand),
        suspect=torch.where(condemned, 1, held.suspect),
        loss=torch.where(fresh, held.last_loss, held.loss),
        age=torch.where(fresh, 0, held.age),
    )


def _either(which: Tensor, then: float, otherwise: float) -> Tensor:
    """Return one of two numbers for each, in float64 whatever torch's default is."""
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (then, otherwise))
    return torch.where(which, one, other)


def _added(evidence: Tensor, more: Tensor) -> Tensor:
    return (evidence + more.clamp(max=_MOST)).clamp(min=0)


def _mean_of_others(values: Tensor, kept: Tensor) -> Tensor:
    """Return for each voter the mean `(2, V)` over the others that are in; 0 where there are none."""
    inside = (kept & values.isfinite().all(0)).double()
    clean = torch.where(inside > 0, values, 0)
    total, number = clean.sum(1, keepdim=True) - clean, inside.sum() - inside
    return total / number.clamp(min=1)
