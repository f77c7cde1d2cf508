"""One decision and its record, and running statistics over many; everything stays on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gaf_ddp import _few_ranks
from gaf_ddp.gramian import kernels
from gaf_ddp.weighting import Weighting, cosine, present


@dataclass(frozen=True)
class Agreement:
    """The record of one decision over W ranks; tensors on the device of the gradients.

    In bucket scope `GAFState.agreement` stacks the decisions of a step: each field gets a leading dimension,
    one entry per bucket, in the order DDP sent them.

    Attributes:
        gramian: `(W, W)`, inner products between the ranks' gradients, as measured; with `vote_momentum` between
            their momenta.
        cosine: `(W, W)` float64, cosines between the voters; 0 beside a rank that is no voter.
        weights: `(W,)`, each rank's share of the result.
        kept: bool `(W,)`, weight is not 0.
        agreed: bool `()`, the step is worth taking: something was kept, or every gradient was zero.
        voters: bool `(W,)`, gradient finite, not zero, not too long.
        nonfinite: bool `(W,)`, gradient has NaN or inf.
        overlong: bool `(W,)`, gradient longer than `max_norm_ratio` times the lower median.
    """

    gramian: Tensor
    cosine: Tensor
    weights: Tensor
    kept: Tensor
    agreed: Tensor
    voters: Tensor
    nonfinite: Tensor
    overlong: Tensor

    @classmethod
    def stack(cls, decisions: Sequence["Agreement"]) -> "Agreement":
        """Return the decisions of one step as one record with a leading dimension."""
        return cls(*(torch.stack([getattr(d, f.name) for d in decisions]) for f in fields(cls)))


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
        ValueError: the weighting returned something that is not `(W,)` weights.
    """
    for fast in (kernels(gramian.device.type, "_triton_decision"), _few_ranks):  # a faster way to the same record
        if fast is not None and fast.can_decide(gramian, weighting):
            return Agreement(gramian, *fast.decide(gramian, weighting, max_norm_ratio))
    nonfinite = ~gramian.diagonal().isfinite()
    candidates = present(gramian)
    overlong = candidates & _longer_than_median(gramian, candidates, max_norm_ratio)
    voters = candidates & ~overlong
    clean = torch.where(voters[:, None] & voters[None, :], gramian, 0)
    weights = _ask(weighting, clean, voters)
    kept = weights != 0
    poisoned = nonfinite.any() & ~voters.any()
    return Agreement(
        gramian=gramian,
        cosine=cosine(clean),
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
        weights = _require_weights(weighting, weighting(clean), len(clean))
        return torch.where(voters, weights.to(clean.dtype), 0)
    chosen = voters.nonzero().squeeze(1)
    scattered = torch.zeros_like(clean[0])
    if len(chosen):
        weights = _require_weights(weighting, weighting(clean[chosen][:, chosen]), len(chosen))
        scattered[chosen] = weights.to(scattered)
    return scattered


def _require_weights(weighting: object, weights: Any, count: int) -> Tensor:
    if isinstance(weights, Tensor) and weights.shape == (count,) and weights.dtype.is_floating_point:
        return weights.detach()
    found = f"{tuple(weights.shape)} of {weights.dtype}" if isinstance(weights, Tensor) else repr(weights)
    raise ValueError(f"weighting must return floating point weights of shape ({count},), "
                     f"found {found} from {weighting!r}")  # fmt: skip


_MOST_PENDING, _MOST_COSINES = 64, 2**14  # decisions that wait to be added up, and their cosines


class AgreementMeter:
    """Running sums over decisions, kept on the device: recording never waits for it, `summary` waits once.

    Decisions are added up many at a time: one by one, that took more launches than the decisions themselves.

    Memory: 4 W + 5 float64 numbers, and the decisions not yet added up: at most 64, of 16 Ki pairs of ranks.
    """

    def __init__(self) -> None:
        self._ranks: Tensor | None = None  # (4, W): how often kept, not finite, too long, zero
        self._totals: Tensor | None = (
            None  # (5,): decisions, not agreed, weight kept, cosines, decisions with pairs
        )
        self._pending: list[Agreement] = []

    def record(self, *agreements: Agreement) -> None:
        """Add decisions over the same W ranks."""
        if self._pending and len(self._pending[0].kept) != len(agreements[0].kept):
            self.reset()
        self._pending += agreements
        if len(self._pending) >= min(_MOST_PENDING, _MOST_COSINES // agreements[0].cosine.numel()):
            self._add_up()

    def _add_up(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        names = ("kept", "voters", "nonfinite", "overlong", "agreed", "cosine")
        kept, voters, nonfinite, overlong, agreed, cosine = (  # (decisions, W), agreed one, cosine W² for each
            torch.stack([getattr(agreement, name) for agreement in pending]) for name in names
        )
        zero = ~(voters | nonfinite | overlong)
        ranks = torch.stack([kept, nonfinite, overlong, zero]).sum(1, dtype=torch.float64)
        number = voters.sum(1, dtype=torch.float64)
        pairs = number * (number - 1)
        cosines = (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / pairs.clamp(min=1)
        each = [torch.ones_like(pairs), ~agreed, kept.mean(1, dtype=torch.float64), cosines, pairs > 0]
        totals = torch.stack([value.sum(dtype=torch.float64) for value in each])
        if self._ranks is None or self._totals is None or self._ranks.shape != ranks.shape:
            self._ranks, self._totals = ranks, totals
            return
        # In place: a sum made on one stream must not be freed while another stream still reads it.
        self._ranks, self._totals = self._ranks.to(ranks).add_(ranks), self._totals.to(totals).add_(totals)

    def summary(self) -> dict[str, float]:
        """Return the means over the recorded decisions, at one host sync; empty if there were none.

        Keys: `gaf/kept_fraction`, `gaf/skipped_fraction`, `gaf/mean_cosine` (over pairs of voters),
        `gaf/nonfinite_fraction`, `gaf/overlong_fraction`, `gaf/zero_fraction`, and `gaf/kept_rank_00` … : the
        share of decisions in which that rank was kept.
        """
        self._add_up()
        if self._ranks is None or self._totals is None:
            return {}
        count = self._ranks.shape[1]
        flat = torch.cat([self._totals, self._ranks.flatten()]).tolist()
        decisions, skipped, kept, cosines, paired = flat[:5]
        by_rank = [[n / decisions for n in flat[5 + i * count : 5 + (i + 1) * count]] for i in range(4)]
        nonfinite, overlong, zero = (sum(shares) / count for shares in by_rank[1:])
        return {
            "gaf/kept_fraction": kept / decisions,
            "gaf/skipped_fraction": skipped / decisions,
            "gaf/mean_cosine": cosines / paired if paired else float("nan"),
            "gaf/nonfinite_fraction": nonfinite,
            "gaf/overlong_fraction": overlong,
            "gaf/zero_fraction": zero,
            **{f"gaf/kept_rank_{rank:02d}": share for rank, share in enumerate(by_rank[0])},
        }

    def reset(self) -> None:
        """Forget everything recorded."""
        self._ranks = self._totals = None
        self._pending = []

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return a copy of the running sums."""
        self._add_up()
        if self._ranks is None or self._totals is None:
            return {"ranks": None, "totals": None}
        return {"ranks": self._ranks.clone(), "totals": self._totals.clone()}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Restore the running sums; those of another world size are dropped at the next decision."""
        self.reset()
        ranks, totals = state["ranks"], state["totals"]
        if ranks is not None and totals is not None:
            self._ranks, self._totals = ranks.clone(), totals.clone()
