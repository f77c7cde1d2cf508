"""One decision and its record; everything stays on the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gaf_ddp.rules.medians import upper_median
from gaf_ddp.rules.weighting import Weighting, cosine, present
from gaf_ddp.runtime.device import kernels, on_host


@dataclass(frozen=True)
class Agreement:
    """The record of one decision over W ranks; on the device of the gradients, of ballots on the host.

    In bucket scope `GAFState.agreement` stacks the decisions of a step: each field gets a leading dimension,
    one entry per bucket, in the order DDP sent them.

    Attributes:
        gramian: `(W, W)`, inner products between the ranks' gradients, as measured; of ballots by their sketches.
        cosine: `(W, W)` float64, cosines between the voters; 0 beside a rank that is no voter.
        weights: `(W,)`, each rank's share of the result.
        kept: bool `(W,)`, weight is not 0.
        agreed: bool `()`, the step is worth taking: something was kept, or every gradient was zero.
        voters: bool `(W,)`, gradient finite, not zero; with tau and weightings not too long.
        nonfinite: bool `(W,)`, gradient has NaN or inf.
        overlong: bool `(W,)`, gradient longer than `max_norm_ratio` times the upper median; in ballots, in any bucket.
        distance: `(W,)` float64, distance to the consensus in its members' median distance, z; None beside other
            rules than the consensus, as are the next two.
        flipped: bool `(W,)`, left out since its mirror image would be a member.
        trusted, condemned: bool `(W,)`, what held-out data says of it; None before the first reading.
        equal: bool `(W, W)`, whose gradients have been equal for ten steps in a row; None beside other rules.
        finished: bool `(W,)`, waits for the others in DDP's Join, out of inputs.
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
    equal: Tensor | None = None
    trusted: Tensor | None = None
    condemned: Tensor | None = None
    finished: Tensor | None = None

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
        max_norm_ratio: longest norm of a voter in units of the upper median norm; None for no guard.

    Where no rank votes and some are not finite, every weight is NaN, so that the result is NaN and GradScaler
    backs off.

    Raises:
        ValueError: the weighting returned something that is not `(W,)` weights, or, on the CPU, one that is not
            finite or is negative; on accelerators `unsound` tells.
    """
    fused = kernels(gramian.device.type, "decide_triton")
    if fused is not None and fused.can_decide(gramian, weighting):
        fast: Agreement = fused.decide(gramian, weighting, max_norm_ratio)
        return fast
    return _decide(gramian, weighting, max_norm_ratio)


def unsound(weights: Tensor, voters: Tensor) -> Tensor:
    """Return bool `(...)`: somebody votes, and of the weights `(..., W)` some are negative or not finite."""
    return ~((weights >= 0) & (weights < math.inf)).all(-1) & voters.any(-1)


def _decide(gramian: Tensor, weighting: Callable[[Tensor], Tensor], max_norm_ratio: float | None) -> Agreement:
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
    return norms > ratio * upper_median(norms, candidates)


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


def _require_weights(weighting: object, weights: object, count: int) -> Tensor:
    """Return the weights, or raise ValueError; what they are, an accelerator tells later (`unsound`)."""
    if not isinstance(weights, Tensor):
        found = repr(weights)
    elif weights.shape != (count,) or not weights.dtype.is_floating_point:
        found = f"{tuple(weights.shape)} of {weights.dtype}"
    elif not on_host(weights) or bool(((weights >= 0) & (weights < math.inf)).all()):
        return weights.detach()
    else:
        found = str(weights.tolist())
    rule = f"weighting must return finite weights >= 0, floating point of shape ({count},)"
    raise ValueError(f"{rule}, found {found} from {weighting!r}")
