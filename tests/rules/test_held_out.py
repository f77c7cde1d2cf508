"""Held-out data as a witness: the rule against a plain reading of it, and what must not change its verdicts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaf_ddp.ballots.witness import cosines_with
from gaf_ddp.rules.held_out import CONDEMNED, TRUSTED, Reading, ReferenceMemory

Cosines = list[list[float]]  # (2, V)


class Plainly:
    """The rule, voter by voter, as its docstring has it."""

    def __init__(self, voters: int) -> None:
        self.verdict, self.d, self.u = [0.0] * voters, [0.0] * voters, [0.0] * voters
        self.f, self.was_condemned = [1.0] * voters, [False] * voters
        self.loss, self.age, self.last = [0.0] * voters, [0] * voters, 0.0
        self.former = [0.0] * voters

    def weigh(self, cosines: Cosines, signal: list[float], loss: float, kept: list[bool]) -> None:
        """Take in one reading."""
        kept = list(kept)
        for j in range(len(kept)):
            limit = 1.05 if self.age[j] == 0 else 2.0 if self.verdict[j] == TRUSTED else math.inf
            if self.verdict[j] and loss > limit * self.loss[j]:
                kept[j] = self.verdict[j] == CONDEMNED
                self.f[j] *= 2 if self.verdict[j] == CONDEMNED else 1
                self.verdict[j] = self.former[j] if self.age[j] == 0 else 0.0
            self.age[j] += 1
        falls, nobody = loss < 0.98 * self.last, not any(self.verdict)
        self.last = loss
        if min(signal) < 0.2:
            cosines = [[0.0] * len(kept)] * 2
        known = [all(math.isfinite(c[j]) for c in cosines) for j in range(len(kept))]
        for j, is_in in enumerate(kept):
            values = []
            for c in cosines:
                others = [c[i] for i in range(len(kept)) if i != j and kept[i] and known[i]]
                values += [c[j], c[j] - (sum(others) / len(others) if others else 0.0)]
            if known[j] and is_in:
                spared = falls and (nobody or self.verdict[j] == TRUSTED)
                self.d[j] = max(0.0, self.d[j] + min(0.4, -max(values) - (0.4 if spared else 0.1)))
            elif known[j]:
                self.u[j] = max(0.0, self.u[j] + min(0.4, min(values) - (0.4 if self.was_condemned[j] else 0.2)))
            if is_in and self.d[j] >= self.f[j] and self.verdict[j] != CONDEMNED:
                self._give(j, CONDEMNED)
                self.was_condemned[j] = True
            elif not is_in and self.u[j] >= 0.5 and self.verdict[j] != TRUSTED:
                self.f[j] *= 2 if self.verdict[j] == CONDEMNED else 1
                self._give(j, TRUSTED)

    def _give(self, j: int, verdict: float) -> None:
        self.former[j] = self.verdict[j]
        self.verdict[j], self.loss[j], self.age[j] = verdict, self.last, 0
        self.d[j] = self.u[j] = 0.0

    def keep(self, good: list[bool], z: list[float]) -> list[bool]:
        """Return who counts."""
        for j, distance in enumerate(z):
            if self.verdict[j] == TRUSTED and distance <= 3:
                self.verdict[j] = 0.0
        return [v == TRUSTED or (v == 0 and g) for v, g in zip(self.verdict, good, strict=True)]


def story(voters: int, seed: int) -> list[tuple[Reading, Tensor, Tensor]]:
    """Return readings, whom the consensus keeps `(V,)` and z `(V,)`, forty of each."""
    random = torch.Generator().manual_seed(seed)
    lean: Tensor = 1.6 * torch.rand(2, voters, generator=random) - 0.8
    lean[:, 0], lean[:, -1] = -0.8, 0.9
    found: list[tuple[Reading, Tensor, Tensor]] = []
    for _ in range(40):
        cosines = (lean + 0.3 * torch.randn(2, voters, generator=random)).clamp(-1, 1).double()
        cosines[:, torch.rand(voters, generator=random) < 0.1] = torch.nan
        signal = 0.1 + torch.rand(2, generator=random).double()
        loss = float(1 + 0.2 * torch.rand((), generator=random)) * (3 if len(found) % 13 == 12 else 1)
        z = 6 * torch.rand(voters, generator=random).double()
        found.append((Reading(cosines, signal, loss), z <= 3, z))
    return found


@pytest.mark.parametrize("voters", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("seed", range(6))
def test_the_rule_is_what_its_docstring_says(voters: int, seed: int) -> None:
    plainly, memory = Plainly(voters), ReferenceMemory()
    kept, seen = torch.ones(voters, dtype=torch.bool), set()
    for reading, good, z in story(voters, seed):
        memory.weigh(reading, kept)
        plainly.weigh(reading.cosines.tolist(), reading.signal.tolist(), reading.loss, kept.tolist())
        kept = memory.keep(good, z, 3.0)
        assert kept.tolist() == plainly.keep(good.tolist(), z.tolist())
        assert memory.evidence is not None
        assert memory.evidence.verdict.tolist() == plainly.verdict
        torch.testing.assert_close(memory.evidence.against.tolist(), plainly.d)
        torch.testing.assert_close(memory.evidence.in_favour.tolist(), plainly.u)
        assert memory.evidence.demand.tolist() == plainly.f
        seen |= set(plainly.verdict)
    assert voters < 7 or len(seen) == 3  # both verdicts were given


def test_verdicts_do_not_depend_on_the_order_of_ranks_and_go_on_after_a_checkpoint() -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    here, there, kept = ReferenceMemory(), ReferenceMemory(), torch.ones(7, dtype=torch.bool)
    for index, (reading, good, z) in enumerate(story(7, 3)):
        here.weigh(reading, kept)
        there.weigh(reading._replace(cosines=reading.cosines[:, order]), kept[order])
        kept, same = here.keep(good, z, 3.0), there.keep(good[order], z[order], 3.0)
        assert torch.equal(kept[order], same)
        if index == 20:
            held, there = there.dump(), ReferenceMemory()
            there.load(held)


def test_without_a_reading_the_consensus_decides_alone() -> None:
    good = torch.tensor([True, False, True])
    assert torch.equal(ReferenceMemory().keep(good, torch.tensor([1.0, 9.0, 1.0]).double(), 3.0), good)


def cosines_plainly(gradients: Tensor, shares: Tensor) -> Tensor:
    """Return the cosines of voters' gradients with the sum of shares, none longer than their upper median."""
    found = []
    for reading in shares.double().unbind(1):
        sound = [share for share in reading if bool(share.isfinite().all()) and bool(share.any())]
        lengths = sorted(float(share.norm()) for share in sound)
        v = torch.zeros(shares.shape[-1], dtype=torch.float64)
        for share in sound:
            v += share * min(1.0, lengths[len(lengths) // 2] / float(share.norm()))
        found.append([float(g.double() @ v / (g.double().norm() * v.norm())) for g in gradients])
    return torch.tensor(found, dtype=torch.float64)


@given(st.integers(1, 7), st.integers(0, 2**20))
def test_cosines_are_those_of_explicit_vectors(voters: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    gradients, shares = torch.randn(voters, 64, generator=random), torch.randn(voters, 2, 64, generator=random)
    shares[0] *= 1e6  # one rank alone is not the witness
    if voters > 2:
        shares[1, 0, 3], shares[2] = torch.nan, 0.0
    expected = cosines_plainly(gradients, shares)
    torch.testing.assert_close(cosines_with(gradients, shares)[0], expected, rtol=1e-9, atol=1e-9)
    unit = cosines_with(gradients * 1e-6, shares * 1e3)[0]
    torch.testing.assert_close(unit, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 7, 64])
def test_the_signal_is_what_shares_have_in_common(world_size: int) -> None:
    random = torch.Generator().manual_seed(world_size)
    found = []
    for _ in range(200):
        noise = torch.randn(world_size, 2, 256, generator=random)
        noise[:, 1] += 1.0  # as long as the noise: half of a share's squared length
        found.append(cosines_with(torch.ones(1, 256), noise)[1])
    mean = torch.stack(found).mean(0)
    torch.testing.assert_close(mean, torch.tensor([0.0, 0.5]).double(), rtol=0, atol=0.02)
    alone = cosines_with(torch.ones(1, 256), noise[:1])[1]
    assert alone.tolist() == [1.0, 1.0]  # of one share nobody knows


def test_who_has_no_gradient_or_no_witness_is_not_judged() -> None:
    gradients, shares = torch.randn(3, 64), torch.randn(3, 2, 64)
    gradients[1] = 0
    assert cosines_with(gradients, shares)[0][:, 1].isnan().all()
    assert cosines_with(gradients, 0 * shares)[0].isnan().all()
    memory = ReferenceMemory()
    unknown, kept = torch.full((2, 3), torch.nan).double(), torch.tensor([True, True, False])
    memory.weigh(Reading(unknown, torch.ones(2).double(), math.nan), kept)
    assert memory.evidence is not None
    assert not memory.evidence.against.any()
    assert not memory.evidence.in_favour.any()
