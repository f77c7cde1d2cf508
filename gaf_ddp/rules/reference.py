"""Held-out data as a witness: who lowers the loss on data that everyone trusts, and who raises it.

Distance to the consensus cannot tell an honest rank that alone has data of its own from a bad one, nor find a bad
majority. The gradient of the loss on a few held-out examples can. It is read twice, as it is and with the logits
divided by 2: an over-confident model has a lower held-out loss with wrong labels, but only by the logits' scale.
With v and v' the two readings, and S_j the sum of voter j's gradients since the last ones,

    c = cos(S_j, v), c' = cos(S_j, v')    r, r' = each minus its mean over the other voters that are in
    in :  D_j ← max(0, D_j − max(c, r, c', r') − 0.1)   condemned at D_j ≥ f_j
    out:  U_j ← max(0, U_j + min(c, r, c', r') − k)     trusted at U_j ≥ 0.5;  k = 0.2, 0.4 once it was condemned

Where the mix of ranks is right, v is noise, and cosines scatter around 0; where it is wrong they are large. So a
verdict needs evidence that adds up. f_j starts at 1, and doubles with each condemnation that was taken back. Evidence
is held while a voter is on the other side, and is 0 after a verdict. A verdict stands until the opposite is shown;
trust ends, too, where the consensus keeps the voter anyway.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gaf_ddp.rules.consensus import upper_median

_AGAINST, _FOR = 1.0, 0.5  # evidence for a verdict
_FALLS = 0.98
_WORSE, _MUCH_WORSE = 1.1, 2.0
_SIGNAL = 0.2
_CAP = 0.4
_MARGIN, _MARGIN_OF_CONDEMNED, _MARGIN_IN = 0.2, 0.4, 0.1  # what a cosine must exceed to count as evidence
REACH = 3.0  # median norms, to which a trusted voter's gradient is shortened: a rank that was out has a long one

TEMPERATURES = 1.0, 2.0  # by which logits are divided in the two readings
TRUSTED, CONDEMNED = 1.0, -1.0


class Evidence(NamedTuple):
    """What speaks for and against V voters, each `(V,)` float64 on the host.

    Attributes:
        verdict: `TRUSTED`, `CONDEMNED` or 0.
        against: D, while in.
        in_favour: U, while out.
        demand: f, what `against` must reach; more than 1 once a condemnation was taken back.
        suspect: 1 where it was condemned before.
    """

    verdict: Tensor
    against: Tensor
    in_favour: Tensor
    demand: Tensor
    suspect: Tensor
    loss: Tensor
    age: Tensor


class ReferenceMemory:
    """The evidence of one state."""

    def __init__(self) -> None:
        self.evidence: Evidence | None = None  # before the first reading
        self.last = 0.0

    def weigh(self, cosines: Tensor, signal: Tensor, loss: float, kept: Tensor) -> None:
        """Take in one reading of held-out data.

        Args:
            cosines: `(2, V)` float64, c and c' of each voter; NaN where it had no gradient since the last reading.
            signal: `(2,)` float64, what part of each reading the ranks' shares have in common.
            kept: bool `(V,)`, who counted.
        """
        count = len(kept)
        if self.evidence is None or len(self.evidence.verdict) != count:
            self.evidence = _no_evidence(count)
        verdict, against, in_favour, demand, suspect, before, age = self.evidence
        age = age + 1
        worse = (verdict != 0) & (loss > torch.where(age <= 1, _WORSE, _MUCH_WORSE) * before)
        worse &= (age <= 1) | (verdict == TRUSTED)
        demand = torch.where(worse & (verdict == CONDEMNED), 2 * demand, demand)
        kept = torch.where(worse, verdict == CONDEMNED, kept)
        verdict = torch.where(worse, 0, verdict)
        both = torch.cat([cosines, cosines - _mean_of_others(cosines, kept)])
        if not bool((signal >= _SIGNAL).all()):
            both = torch.zeros_like(both)
        known = both.isfinite().all(0)
        falls = loss < _FALLS * self.last
        self.last = loss
        best, worst = both.amax(0), both.amin(0)
        margin = torch.where(suspect > 0, _MARGIN_OF_CONDEMNED, _MARGIN)
        against = torch.where(known & kept & (not falls), (against + (-best - _MARGIN_IN).clamp(max=_CAP)).clamp(min=0), against)
        in_favour = torch.where(known & ~kept, (in_favour + (worst - margin).clamp(max=_CAP)).clamp(min=0), in_favour)
        condemned = kept & (against >= demand * _AGAINST) & (verdict != CONDEMNED)
        trusted = ~kept & (in_favour >= _FOR) & (verdict != TRUSTED)
        demand = torch.where(trusted & (verdict == CONDEMNED), 2 * demand, demand)
        verdict = torch.where(condemned, CONDEMNED, torch.where(trusted, TRUSTED, verdict))
        fresh = condemned | trusted
        self.evidence = Evidence(
            verdict,
            torch.where(fresh, 0, against),
            torch.where(fresh, 0, in_favour),
            demand,
            torch.where(condemned, 1, suspect),
            torch.where(fresh, loss, before),
            torch.where(fresh, 0, age),
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
        """Return the evidence as one matrix `(5, V)`, `(5, 0)` where there is none."""
        return torch.stack(self.evidence or _no_evidence(0))

    def load(self, held: Tensor) -> None:
        """Restore what `dump` returned."""
        self.evidence = Evidence(*held.clone()) if held.shape[1] else None


def _no_evidence(count: int) -> Evidence:
    none = torch.zeros(count, dtype=torch.float64)
    return Evidence(none, none, none, none + 1, none, none, none)


def _mean_of_others(values: Tensor, kept: Tensor) -> Tensor:
    """Return for each voter the mean `(2, V)` over the others that are in; 0 where there are none."""
    inside = (kept & values.isfinite().all(0)).double()
    clean = torch.where(inside > 0, values, 0)
    total, number = clean.sum(1, keepdim=True) - clean, inside.sum() - inside
    return total / number.clamp(min=1)


def cosines_with(gradients: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines `(2, V)` float64 of voters' gradients with both readings of held-out data.

    Nothing waits for an accelerator; some fifteen launches.

    Args:
        gradients: `(V, k)` float32, sketches of what each voter's gradients add up to.
        shares: `(W, 2, k)` float32, sketches of each rank's share of the two readings. One that is not finite counts
            as none. One that is longer than the others' median length is shortened to it, so that no rank alone is
            the witness.

    Returns:
        NaN beside a voter without a gradient, and in all where nobody has a share.
    """
    wide = shares.double()
    wide = torch.where(wide.isfinite().all(-1, keepdim=True), wide, 0)
    lengths = torch.linalg.vector_norm(wide, dim=-1)  # (W, 2)
    factor = (upper_median(lengths, lengths > 0) / lengths).clamp(max=1)
    factor = torch.where(lengths > 0, factor, 0)
    readings = (wide * factor[..., None]).sum(0)  # (2, k)
    sums = gradients.double()
    inner = readings @ sums.mT
    scale = torch.linalg.vector_norm(readings, dim=1)[:, None] * torch.linalg.vector_norm(sums, dim=1)
    cosines = torch.where(scale > 0, inner / scale, math.nan)
    apart = (wide * factor[..., None]).square().sum((0, 2))
    number = (lengths > 0).sum(0)
    coherence = (readings.square().sum(1) / apart - 1) / (number - 1)
    return cosines, torch.where(number > 1, coherence, 1)
