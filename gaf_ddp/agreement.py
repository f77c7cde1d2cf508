"""One decision and its record; everything stays on the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.device import kernels, on_host
from gaf_ddp.weighting import Weighting, cosine, plain_cosine, present

_FEW = 16  # ranks; the time in plain numbers grows with their square


@dataclass(frozen=True)
class Agreement:
    """The record of one decision over W ranks; tensors on the device of the gradients.

    In bucket scope `GAFState.agreement` stacks the decisions of a step: each field gets a leading dimension,
    one entry per bucket, in the order DDP sent them.

    Attributes:
        gramian: `(W, W)`, inner products between the ranks' gradients, as measured; with `vote_momentum` between
            their momenta; in running scope with the last step's for buckets still to come.
        cosine: `(W, W)` float64, cosines between the voters; 0 beside a rank that is no voter.
        weights: `(W,)`, each rank's share of the result.
        kept: bool `(W,)`, weight is not 0.
        agreed: bool `()`, the step is worth taking: something was kept, or every gradient was zero.
        voters: bool `(W,)`, gradient finite, not zero, not too long.
        nonfinite: bool `(W,)`, gradient has NaN or inf.
        overlong: bool `(W,)`, gradient longer than `max_norm_ratio` times the lower median.
        distance: `(W,)` float64, distance to the consensus in its members' median distance, z; None beside other
            rules than the consensus, as is the next.
        flipped: bool `(W,)`, left out since its mirror image would be a member.
    """

    gramian: Tensor
    cosine: Tensor
    weights: Tensor
    kept: Tensor
    agreed: Tensor
    voters: Tensor
    nonfinite: Tensor
    overlong: Tensor
    distance: Tensor | None = None
    flipped: Tensor | None = None

    @classmethod
    def stack(cls, decisions: Sequence["Agreement"]) -> "Agreement":
        """Return the decisions of one step as one record with a leading dimension."""
        names = [field.name for field in fields(cls) if all(getattr(d, field.name) is not None for d in decisions)]
        return cls(**{name: torch.stack([getattr(d, name) for d in decisions]) for name in names})


def decide(gramian: Tensor, weighting: Callable[[Tensor], Tensor], max_norm_ratio: float | None) -> Agreement:
    """Judge one Gramian: find the voters, ask the weighting, record what it said.

    Args:
        gramian: `(W, W)`, may hold NaN and inf.
        weighting: Gramian to weights. A `Weighting` never waits for the device; a foreign callable is shown the
            Gramian of the voters alone, which costs one host sync on an accelerator.
        max_norm_ratio: longest norm of a voter in units of the lower median norm; None for no guard.

    Where no rank votes and some are not finite, every weight is NaN, so that the result is NaN and GradScaler
    backs off.

    Raises:
        ValueError: the weighting returned something that is not `(W,)` weights, or, on the CPU, one that is not
            finite or is negative; on accelerators `unsound` tells.
    """
    fused = kernels(gramian.device.type, "_triton_decision")
    if fused is not None and fused.can_decide(gramian, weighting):
        fast: Agreement = fused.decide(gramian, weighting, max_norm_ratio)
        return fast
    if on_host(gramian) and len(gramian) <= _FEW and "of_few" in vars(type(weighting)):
        return _decide_few(gramian, weighting, max_norm_ratio)
    return _decide_many(gramian, weighting, max_norm_ratio)


def unsound(weights: Tensor, voters: Tensor) -> Tensor:
    """Return bool `(...)`: somebody votes, and of the weights `(..., W)` some are negative or not finite."""
    return ~((weights >= 0) & (weights < math.inf)).all(-1) & voters.any(-1)


def _decide_many(
    gramian: Tensor, weighting: Callable[[Tensor], Tensor], max_norm_ratio: float | None
) -> Agreement:
    nonfinite = ~gramian.diagonal().isfinite()
    candidates = present(gramian)
    overlong = candidates & _longer_than_median(gramian, candidates, max_norm_ratio)
    voters = candidates & ~overlong
    clean = torch.where(voters[:, None] & voters[None, :], gramian, 0)
    similarity = cosine(clean)  # before the weighting, which may change what it is shown
    weights = _ask(weighting, clean, voters)
    kept = weights != 0
    poisoned = nonfinite.any() & ~voters.any()
    return Agreement(
        gramian=gramian,
        cosine=similarity,
        weights=torch.where(poisoned, torch.nan, weights),
        kept=kept,
        agreed=kept.any() | ~(voters.any() | poisoned),
        voters=voters,
        nonfinite=nonfinite,
        overlong=overlong,
    )


def _longer_than_median(gramian: Tensor, candidates: Tensor, ratio: float | None) -> Tensor:
    if ratio is None:
        return torch.zeros_like(candidates)
    norms = gramian.diagonal().double().sqrt()
    ordered = torch.where(candidates, norms, torch.inf).sort().values
    median = ordered.gather(0, (candidates.sum() - 1).clamp(min=0).div(2, rounding_mode="floor").view(1))
    return norms > ratio * median


def _ask(weighting: Callable[[Tensor], Tensor], clean: Tensor, voters: Tensor) -> Tensor:
    if isinstance(weighting, Weighting):
        weights = _require_weights(weighting, weighting(clean), len(voters))
        return torch.where(voters, weights.to(clean.dtype), 0)
    chosen = voters.nonzero().squeeze(1)
    scattered = torch.zeros_like(clean[0])
    if len(chosen):
        weights = _require_weights(weighting, weighting(clean[chosen][:, chosen]), len(chosen))
        scattered[chosen] = weights.to(scattered)
    return scattered


def _require_weights(weighting: object, weights: Tensor, count: int) -> Tensor:
    """Return the weights, or raise ValueError; what they are, an accelerator tells later (`unsound`)."""
    found = repr(weights)
    if isinstance(weights, Tensor) and weights.shape == (count,) and weights.dtype.is_floating_point:
        if not on_host(weights) or bool(((weights >= 0) & (weights < math.inf)).all()):
            return weights.detach()
        found = str(weights.tolist())
    elif isinstance(weights, Tensor):
        found = f"{tuple(weights.shape)} of {weights.dtype}"
    rule = f"weighting must return finite weights >= 0, floating point of shape ({count},)"
    raise ValueError(f"{rule}, found {found} from {weighting!r}")


def _decide_few(gramian: Tensor, weighting: Any, max_norm_ratio: float | None) -> Agreement:
    """Decide in plain numbers, by the weighting's `of_few`."""
    inner: list[list[float]] = gramian.tolist()
    ranks = range(len(inner))
    nonfinite = [not math.isfinite(inner[i][i]) for i in ranks]
    norm = {i: math.sqrt(inner[i][i]) for i in ranks if not nonfinite[i] and inner[i][i] > 0}
    limit = math.inf if max_norm_ratio is None or not norm else max_norm_ratio * median_low(norm.values())
    voters = [i for i in norm if norm[i] <= limit]
    cosines = [[plain_cosine(inner, i, j) if i in voters and j in voters else 0.0 for j in ranks] for i in ranks]
    counts = _require_counts(
        weighting, weighting.of_few(inner, list(voters)), voters
    )  # may change what it is shown
    poisoned = any(nonfinite) and not voters
    total = math.fsum(counts.values())
    shares = [math.nan if poisoned else counts[i] / total if counts.get(i) else 0.0 for i in ranks]
    kept = [counts.get(i, 0.0) > 0 for i in ranks]
    overlong = [i in norm and i not in voters for i in ranks]
    flags = torch.tensor([kept, [i in voters for i in ranks], nonfinite, overlong])
    return Agreement(
        gramian,
        torch.tensor(cosines, dtype=torch.float64),
        torch.tensor(shares, dtype=gramian.dtype),
        flags[0],
        torch.tensor(any(kept) or not (voters or poisoned)),
        *flags[1:],
    )


def _require_counts(weighting: object, counts: Any, voters: list[int]) -> dict[int, float]:
    if isinstance(counts, dict) and all(i in voters and 0 <= count < math.inf for i, count in counts.items()):
        return counts
    rule = f"of_few must return what voters count, finite and >= 0, by their ranks among {voters}"
    raise ValueError(f"{rule}, found {counts!r} from {weighting!r}")
