"""The judge of the late way: momenta of all voters' sketches, on the device, and the rule, on the host."""

import io
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaf_ddp.ballots.witness import Witness
from gaf_ddp.rules.held_out import Evidence, Reading, ReferenceMemory
from gaf_ddp.rules.memory import ConsensusMemory


class Opinion(NamedTuple):
    """What a ballot says of V voters, on the host.

    Attributes:
        kept: bool `(V,)`, who counts from now on.
        z: `(V,)` float64, distance to the consensus, NaN where it is not known.
        flipped: bool `(V,)`, left out since its mirror image would be a member.
        gramian: `(V, V)` float64, inner products of the ballot's gradients, by their sketches.
        equal: bool `(V, V)`, whose gradients have been equal for ten steps in a row.
        by_held_out: `(V,)` float64, `TRUSTED`, `CONDEMNED` or 0 by held-out data; None before the first of it.
    """

    kept: Tensor
    z: Tensor
    flipped: Tensor
    gramian: Tensor
    equal: Tensor
    by_held_out: Tensor | None


class Judge:
    """The consensus rule over ballots.

    Momenta `(V, k)` stay on the device, where `tally` adds each ballot to them. The rule needs two matrices `(V, V)` of
    them, which the host reads a step later (`judge`).

    Args:
        ratio: largest z of a kept voter.
        momentum: decay of the momenta, per step.
    """

    def __init__(self, ratio: float, momentum: float) -> None:
        self.ratio, self.momentum = ratio, momentum
        self._memory, self._reference = ConsensusMemory(), ReferenceMemory()
        self._witness = Witness()
        self._momenta: Tensor | None = None
        self._moves: Tensor | None = None  # (V, V), multiplies the momenta before the next gradients are added
        self.kept = torch.ones(0, dtype=torch.bool)

    def tally(self, gradients: Tensor, steps: int, shares: Tensor | None = None) -> Tensor:
        """Add a ballot's gradients to the momenta; never waits for the device, some eight launches.

        Args:
            gradients: sketches `(V, k)` float32; zeros beside a voter that has none.
            steps: how many steps they are the sum of.
            shares: `(W, 2, k)` float32, each rank's share of two readings of held-out data, if this ballot has them.

        Returns:
            `(2 V, 2 V)` float64, inner products of the momenta, and behind them of the gradients. With shares two
            rows more: the cosines `(2, V)` of what the voters' gradients since the last reading add up to, and the
            signal `(2,)` of the shares (`cosines_with`).
        """
        momenta = self._momenta
        if momenta is None or momenta.shape != gradients.shape:
            momenta, self._moves = torch.zeros_like(gradients), None
        momenta = momenta.to(gradients.device)
        if self._moves is not None:
            moves = self._moves.to(gradients.device, non_blocking=True)
            finite = momenta.nan_to_num(0.0, 0.0, 0.0)  # else NaN in one row would spread to all
            momenta = (moves @ finite.double()).float()
        self._momenta = torch.add(gradients, momenta, alpha=self.momentum**steps)
        both = torch.cat([self._momenta, gradients]).double()  # float32 products may silently use TF32
        products = both @ both.mT
        self._witness.add(gradients)
        if shares is None:
            return products
        cosines, signal = self._witness.compare(gradients, shares)
        found = products.new_zeros(2, products.shape[1])
        found[0], found[1, :2] = cosines.flatten(), signal
        return torch.cat([products, found])

    def judge(self, products: Tensor, voters: Tensor, steps: int, loss: float = math.nan) -> Opinion:
        """Judge a ballot by what `tally` returned, read on the host, and remember it.

        Args:
            products: as `tally` returned it, on the host.
            voters: bool `(V,)`, who has a gradient that is finite and not zero.
            steps: how many steps the ballot is about.
            loss: on held-out data, if the ballot has a reading of them.
        """
        count = len(voters)
        if len(self.kept) != count:
            self.kept = torch.ones(count, dtype=torch.bool)
        gramian = products[count : 2 * count, count:]
        found = self._memory.judge(products[:count, :count], gramian, voters, steps)
        if len(products) > 2 * count:
            cosines, signal = products[2 * count].view(2, count), products[2 * count + 1, :2]
            self._reference.weigh(Reading(cosines, signal, loss), self.kept)
        good = torch.where(found.z.isnan(), self.kept, found.z <= self.ratio) & ~found.flipped
        good = self._reference.keep(good, found.z, self.ratio)
        if bool((good & voters).any()):  # else nobody would count
            self.kept = good
        on_host = self._momenta is None or self._momenta.device.type == "cpu"
        self._moves = found.moves if on_host else found.moves.pin_memory()
        by_held_out = None if self._reference.evidence is None else self._reference.evidence.verdict
        return Opinion(self.kept, found.z, found.flipped, gramian, found.equal, by_held_out)

    @property
    def has_held_out(self) -> bool:
        """Whether held-out data have been read."""
        return self._reference.evidence is not None

    def dump(self) -> bytes:
        """Return all of it, at a host sync, as bytes without code."""
        file = io.BytesIO()
        momenta = None if self._momenta is None else self._momenta.cpu()
        sums = None if self._witness.sums is None else self._witness.sums.cpu()
        held = {"momenta": momenta, "moves": self._moves, "kept": self.kept, "cosines": self._memory.cosines}
        torch.save({**held, "equal": self._memory.equal, "sums": sums, "evidence": self._reference.dump()}, file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        """Restore what `dump` returned. If the world size has changed, the memory is reset at the next ballot.

        Raises:
            ValueError: content is something else; nothing is changed then.
        """
        try:
            found: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
            _require_sound(**found)
        except Exception as error:
            raise ValueError(f"memory must be what state_dict() returned, found {content!r:.60}") from error
        self._momenta, self._moves, self.kept = found["momenta"], found["moves"], found["kept"]
        self._memory.cosines, self._memory.equal = found["cosines"], found["equal"]
        self._witness.sums = found["sums"]
        self._reference.load(found["evidence"])


def _require_sound(
    momenta: Tensor | None,
    moves: Tensor | None,
    sums: Tensor | None,
    kept: Tensor,
    cosines: Tensor,
    equal: Tensor,
    evidence: Tensor,
) -> None:
    """Raise ValueError unless these are of V voters each, and finite."""
    count = len(kept)
    sound = kept.dtype == torch.bool and kept.shape == (count,)
    sound &= cosines.dim() == 3 and len(cosines) == 2 and cosines.shape[1:] == equal.shape
    sound &= equal.shape in ((count, count), (0, 0))
    sound &= evidence.dim() == 2 and len(evidence) == len(Evidence._fields) and evidence.shape[1] in (count, 0)
    for each in (momenta, sums):
        if each is not None:
            sound &= each.dtype == torch.float32 and each.dim() == 2 and len(each) in (count, 0)
    wide = [cosines, equal, evidence]
    if moves is not None:
        sound &= moves.shape == (count, count)
        wide.append(moves)
    sound &= all(each.dtype == torch.float64 and bool(each.isfinite().all()) for each in wide)
    if not sound:
        raise ValueError("of unlike shapes, dtypes, or not finite")
