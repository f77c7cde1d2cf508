"""Running statistics over many decisions, kept on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.agreement import Agreement, unsound
from gaf_ddp.saved import require_numbers

# Decisions in which a rank was that; those that know its distance, and the sum of these.
_BY_RANK = ("kept", "nonfinite", "overlong", "zero", "differing", "judged", "distance")
# Decisions; those that kept nothing; those with no weights; those with a mean cosine, and the sum of these.
_IN_ALL = ("decisions", "skipped", "unsound", "paired", "cosine")
FARTHEST = 100.0  # what a z beyond it counts as: one of 1e20 would hide all others
_MOST_PENDING, _MOST_COSINES = 64, 2**14  # decisions that wait to be added up, and their cosines


def most_pending(size: int) -> int:
    """Return how many decisions over so many ranks may wait to be added up."""
    return min(_MOST_PENDING, _MOST_COSINES // size**2)


class AgreementMeter:
    """Running sums over decisions: recording never waits for the device, reading waits once.

    Decisions are added up many at a time: one by one, that took more launches than the decisions themselves.

    Memory: 7 W + 5 float64 numbers, and the decisions not yet added up: at most 64, of 16 Ki pairs of ranks.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (W,) or (1,), float64
        self._pending: list[tuple[Agreement, Tensor]] = []

    def record(self, decisions: Sequence[tuple[Agreement, Tensor]]) -> None:
        """Add decisions over the same W ranks, each with the numbers `(W,)` of the ranks' settings."""
        if self._pending and len(self._pending[0][1]) != len(decisions[0][1]):
            self.reset()
        self._pending += decisions
        if len(self._pending) >= most_pending(len(decisions[0][1])):
            self._add_up()

    def require_sound(self) -> None:
        """Raise ValueError if ranks decided by unlike settings or a weighting returned no weights: a host sync."""
        self._add_up()
        self._require_sound(self._read())

    def summary(self) -> dict[str, float]:
        """Return the means over the recorded decisions, at one host sync; empty if there were none.

        Keys: `gaf/kept_fraction`, `gaf/skipped_fraction`, `gaf/mean_cosine` (over pairs of voters),
        `gaf/nonfinite_fraction`, `gaf/overlong_fraction`, `gaf/zero_fraction`, and `gaf/kept_rank_00` … : the
        share of decisions in which that rank was kept. With the consensus rule `gaf/distance_rank_00` … too: its
        mean z, each at most 100, NaN where it has none.

        Raises:
            ValueError: as `require_sound`.
        """
        self._add_up()
        sums = self._read()
        (decisions,) = sums["decisions"] or [0.0]
        if not decisions:
            return {}
        self._require_sound(sums)
        shares = {name: [number / decisions for number in sums[name]] for name in _BY_RANK}
        judged = any(sums["judged"])
        distances = [z / n if n else float("nan") for z, n in zip(sums["distance"], sums["judged"], strict=True)]
        mean = {name: sum(share) / len(share) for name, share in shares.items()}
        (skipped,), (cosine,), (paired,) = sums["skipped"], sums["cosine"], sums["paired"]
        return {
            "gaf/kept_fraction": mean["kept"],
            "gaf/skipped_fraction": skipped / decisions,
            "gaf/mean_cosine": cosine / paired if paired else float("nan"),
            **{f"gaf/{name}_fraction": mean[name] for name in ("nonfinite", "overlong", "zero")},
            **{f"gaf/kept_rank_{rank:02d}": share for rank, share in enumerate(shares["kept"])},
            **{f"gaf/distance_rank_{rank:02d}": z for rank, z in enumerate(distances) if judged},
        }

    def reset(self) -> None:
        """Forget everything recorded."""
        self._sums, self._pending = {}, []

    def state_dict(self) -> dict[str, list[float]]:
        """Return the running sums as plain numbers, lists of W or one, empty before the first: one host sync."""
        self._add_up()
        return self._read()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the running sums; those of another world size are dropped at the next decision.

        Raises:
            ValueError: state is not what `state_dict` returns; nothing is changed then.
        """
        require_numbers("meter", state, _BY_RANK, _IN_ALL)
        self.reset()
        if state["kept"]:
            self._sums = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in state.items()}

    def _add_up(self) -> None:
        if not self._pending:
            return
        sums = _sums([agreement for agreement, _ in self._pending], torch.stack([s for _, s in self._pending]))
        self._pending = []
        if not self._sums or self._sums["kept"].shape != sums["kept"].shape:
            self._sums = sums
            return
        for name, more in sums.items():
            # In place: a sum made on one stream must not be freed while another stream still reads it.
            self._sums[name] = self._sums[name].to(more).add_(more)

    def _read(self) -> dict[str, list[float]]:
        if not self._sums:
            return {name: [] for name in (*_BY_RANK, *_IN_ALL)}
        numbers = iter(torch.cat(list(self._sums.values())).tolist())
        return {name: [next(numbers) for _ in values] for name, values in self._sums.items()}

    def _require_sound(self, sums: dict[str, list[float]]) -> None:
        differing = [rank for rank, count in enumerate(sums["differing"]) if count]
        if differing:
            raise ValueError(f"settings must be the same on every rank, found others than rank 0's on {differing}")
        if any(sums["unsound"]):
            found = f"others in {sums['unsound'][0]:.0f} decisions"
            raise ValueError(f"weighting must return finite weights >= 0, found {found}")


def _sums(agreements: list[Agreement], settings: Tensor) -> dict[str, Tensor]:
    """Return what D decisions over W ranks add to the running sums; settings `(D, W)`."""
    kept, voters, nonfinite, overlong, agreed, cosine, weights = (  # (D, W), agreed (D,), cosine (D, W, W)
        torch.stack([getattr(agreement, name) for agreement in agreements])
        for name in ("kept", "voters", "nonfinite", "overlong", "agreed", "cosine", "weights")
    )
    number = voters.sum(1, dtype=torch.float64)
    pairs = number * (number - 1)
    cosines = (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / pairs.clamp(min=1)
    zero = ~(voters | nonfinite | overlong)
    differing = settings != settings[:, :1]
    distances = [agreement.distance for agreement in agreements if agreement.distance is not None]
    z = torch.stack(distances) if distances else torch.full_like(cosine[:1, 0], torch.nan)  # (up to D, W)
    by_rank = torch.stack([kept, nonfinite, overlong, zero, differing]).sum(1, dtype=torch.float64)
    judged = torch.stack([(~z.isnan()).sum(0, dtype=torch.float64), z.clamp(max=FARTHEST).nansum(0)])
    by_rank = torch.cat([by_rank, judged])
    each = [torch.ones_like(pairs), ~agreed, unsound(weights, voters), pairs > 0, cosines]
    in_all = torch.stack([value.sum(0, True, dtype=torch.float64) for value in each])
    return {**dict(zip(_BY_RANK, by_rank, strict=True)), **dict(zip(_IN_ALL, in_all, strict=True))}
