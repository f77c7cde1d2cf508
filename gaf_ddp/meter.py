"""Running statistics over many decisions, kept on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.agreement import Agreement, unsound

_BY_RANK = ("kept", "nonfinite", "overlong", "zero", "differing")  # decisions in which a rank was that
# Decisions; those that kept nothing; those with no weights; those with a mean cosine, and the sum of these.
_IN_ALL = ("decisions", "skipped", "unsound", "paired", "cosine")
_MOST_PENDING, _MOST_COSINES = 64, 2**14  # decisions that wait to be added up, and their cosines


class AgreementMeter:
    """Running sums over decisions: recording never waits for the device, reading waits once.

    Decisions are added up many at a time: one by one, that took more launches than the decisions themselves.

    Memory: 5 W + 5 float64 numbers, and the decisions not yet added up: at most 64, of 16 Ki pairs of ranks.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (W,) or (1,), float64
        self._pending: list[tuple[Agreement, Tensor]] = []

    def record(self, decisions: Sequence[tuple[Agreement, Tensor]]) -> None:
        """Add decisions over the same W ranks, each with the numbers `(W,)` of the ranks' settings."""
        if self._pending and len(self._pending[0][1]) != len(decisions[0][1]):
            self.reset()
        self._pending += decisions
        if len(self._pending) >= min(_MOST_PENDING, _MOST_COSINES // len(decisions[0][1]) ** 2):
            self._add_up()

    def require_sound(self) -> None:
        """Raise ValueError if ranks decided by unlike settings or a weighting returned no weights: a host sync."""
        self._add_up()
        self._require_sound(self._read())

    def summary(self) -> dict[str, float]:
        """Return the means over the recorded decisions, at one host sync; empty if there were none.

        Keys: `gaf/kept_fraction`, `gaf/skipped_fraction`, `gaf/mean_cosine` (over pairs of voters),
        `gaf/nonfinite_fraction`, `gaf/overlong_fraction`, `gaf/zero_fraction`, and `gaf/kept_rank_00` … : the
        share of decisions in which that rank was kept.

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
        mean = {name: sum(share) / len(share) for name, share in shares.items()}
        (skipped,), (cosine,), (paired,) = sums["skipped"], sums["cosine"], sums["paired"]
        return {
            "gaf/kept_fraction": mean["kept"],
            "gaf/skipped_fraction": skipped / decisions,
            "gaf/mean_cosine": cosine / paired if paired else float("nan"),
            **{f"gaf/{name}_fraction": mean[name] for name in ("nonfinite", "overlong", "zero")},
            **{f"gaf/kept_rank_{rank:02d}": share for rank, share in enumerate(shares["kept"])},
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
        names = (*_BY_RANK, *_IN_ALL)
        sound = isinstance(state, dict) and set(state) == set(names)
        sound = sound and all(isinstance(numbers, list) for numbers in state.values())
        count = len(state["kept"]) if sound else 0
        expected = [count] * len(_BY_RANK) + [min(count, 1)] * len(_IN_ALL)
        sound = sound and [len(state[name]) for name in names] == expected
        if not sound or not all(type(x) in (int, float) for numbers in state.values() for x in numbers):
            raise ValueError(f"meter must hold lists of numbers as state_dict() returns them, found {state!r}")
        self.reset()
        if count:
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
    by_rank = torch.stack([kept, nonfinite, overlong, zero, differing]).sum(1, dtype=torch.float64)
    each = [torch.ones_like(pairs), ~agreed, unsound(weights, voters), pairs > 0, cosines]
    in_all = torch.stack([value.sum(0, True, dtype=torch.float64) for value in each])
    return {**dict(zip(_BY_RANK, by_rank, strict=True)), **dict(zip(_IN_ALL, in_all, strict=True))}
