"""From counted ballots to the verdict: who counts from now on, how long gradients may be, and the record."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gaf_ddp.ballots.ballot import Numbers
from gaf_ddp.ballots.judge import Judge
from gaf_ddp.ballots.voters import Voters
from gaf_ddp.rules.agreement import Agreement, decide
from gaf_ddp.rules.held_out import CONDEMNED, REACH, TRUSTED
from gaf_ddp.rules.medians import upper_median
from gaf_ddp.rules.weighting import cosine


class Verdict(NamedTuple):
    """What holds from now on.

    Attributes:
        kept: bool `(W,)`, who counts.
        limits: `(W, buckets)` float64, the longest norm of each bucket's gradient.
        agreement: the record of what the ballots said.
        guarded: whether the gradient of a rank that counted was shortened, or left out of a bucket: then the sum is
            not that of the gradients that ranks voted with, and must not be checked.
    """

    kept: Tensor
    limits: Tensor
    agreement: Agreement
    guarded: bool


def draw(
    judge: Judge,
    products: Tensor,
    numbers: Numbers,
    voters: Voters,
    steps: int,
    max_norm_ratio: float | None,
    limits: Tensor,
    counted: Tensor,
) -> Verdict:
    """Judge counted ballots, in float64 on the host; the same on every rank.

    Args:
        judge: the rule, with its memory.
        products: what `judge.tally` returned for the ballots.
        numbers: what else they say.
        voters: who votes together.
        steps: how many steps the ballots are about.
        max_norm_ratio: longest norm, in upper medians of those who count; None for no limit.
        limits: `(W, buckets)`, those of these steps; they hold on for buckets in which nobody had a gradient.
        counted: bool `(W,)`, who counted in them.
    """
    squares = numbers.squares / steps
    total = numbers.total
    nonfinite = ~total.isfinite()
    present = ~nonfinite & (total > 0)
    losses = numbers.loss[numbers.loss.isfinite()]
    found = judge.judge(products, voters.any_of(present), steps, float(losses.mean()) if len(losses) else math.nan)
    kept = voters.spread(found.kept)
    counting = kept & present
    norms = squares.sqrt()
    gramian = voters.spread(found.gramian)
    if steps == 1 and voters.are_ranks:
        gramian = as_long_as(gramian, total)
    by_held_out = None if found.by_held_out is None else voters.spread(found.by_held_out)
    agreement = Agreement(
        gramian=gramian,
        cosine=cosine(torch.where(present[:, None] & present[None, :], gramian, 0)),
        weights=counting.double() / counting.sum().clamp(min=1),
        kept=counting,
        agreed=counting.any() | ~(present.any() | nonfinite.any()),
        voters=present,
        nonfinite=nonfinite,
        overlong=present & (norms > limits).any(1),
        distance=voters.spread(found.z),
        flipped=voters.spread(found.flipped),
        equal=voters.spread(found.equal),
        trusted=None if by_held_out is None else by_held_out == TRUSTED,
        condemned=None if by_held_out is None else by_held_out == CONDEMNED,
        finished=numbers.finished != 0,
    )
    median = upper_median(norms, counting[:, None] & (norms > 0))
    reach = torch.full((len(kept), 1), math.inf if max_norm_ratio is None else max_norm_ratio, dtype=torch.float64)
    if agreement.trusted is not None:
        reach[agreement.trusted] = reach[agreement.trusted].clamp(max=REACH)
    longest = torch.where(median < math.inf, reach * median, limits)
    alike = norms.isfinite() & (norms <= limits) & ((norms > 0) | (norms == 0).all(0))
    return Verdict(kept, longest, agreement, guarded=not bool(alike[counted].all()))


def watch(
    weighting: Callable[[Tensor], Tensor], products: Tensor, numbers: Numbers, max_norm_ratio: float | None
) -> Verdict:
    """Record what a rule without a memory would have decided on the ballots' gradients; everyone counts."""
    total = numbers.squares.sum(1)
    gramian = as_long_as(products, total)
    gramian.diagonal()[~total.isfinite()] = math.nan
    agreement = decide(gramian, weighting, max_norm_ratio)
    everyone = torch.ones_like(agreement.kept)
    return Verdict(everyone, torch.full_like(numbers.squares, math.inf), agreement, guarded=False)


def as_long_as(gramian: Tensor, squares: Tensor) -> Tensor:
    """Return a Gramian `(W, W)` of sketches, whose norms are off by 1/√k, with the exact squared norms `(W,)`."""
    length = gramian.diagonal().sqrt()
    exact = torch.where((length > 0) & squares.isfinite(), squares.sqrt() / length, 1)
    return gramian * exact[:, None] * exact[None, :]
