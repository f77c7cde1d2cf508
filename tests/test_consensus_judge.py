"""The judge with the consensus rule's memory: what a saved one knows when it goes on under new buckets."""

from collections.abc import Hashable, Iterable

import pytest
import torch
from torch import Tensor

from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.rules.consensus import ConsensusAgreement
from gaf_ddp.consensus_judge import ByConsensus

SHARED = 60  # steps; a turned sign counts from the 50th on


def turning(steps: int, size: int = 30) -> Tensor:
    """Return gradients `(S, 4, n)`, rank 1's with its sign turned.

    What they have in common turns at every step, so that momenta do not show it.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0)
    signs = torch.tensor([1.0, -1.0]).repeat(steps)[:steps, None, None]
    gradients: Tensor = signs * common + torch.randn(steps, 4, size, generator=generator) / size**0.5
    gradients[:, 1] *= -1
    return gradients


def step(judge: ByConsensus, keys: Iterable[Hashable], rows: Tensor) -> list[Agreement]:
    """Let the judge decide on these buckets of equal rows, one by one."""
    agreements = [judge.decide([key], judge.measure(key, rows), ConsensusAgreement(), 10.0) for key in keys]
    judge.finish()
    return agreements


def turned(agreement: Agreement) -> list[int]:
    """Return the ranks that are left out for the sign of their gradients."""
    assert agreement.flipped is not None
    ranks: list[int] = agreement.flipped.nonzero().flatten().tolist()
    return ranks


@pytest.mark.parametrize("scope", ["bucket", "model", "running"])
def test_a_turned_sign_stays_out_over_a_resume(scope: str) -> None:
    """In the first step's layout, which has fewer buckets here, and in the one it waits for."""
    saved, judge = ByConsensus(3.0, scope), ByConsensus(3.0, scope)
    *before, first, second, third = turning(SHARED + 3)
    for rows in before:
        agreements = step(saved, ["a", "b"], rows)
    assert [turned(each) for each in agreements] == [[1], [1]]
    judge.load(saved.dump(30))
    for keys, rows in [(["all"], first), (["A", "B"], second), (["A", "B"], third)]:
        for each in step(judge, keys, rows):
            assert each.kept.tolist() == [True, False, True, True]


def test_buckets_have_the_memories_that_they_had() -> None:
    """Each its own, also where no step came between loading and saving again; a first layout changes none."""
    saved, judge, again = (ByConsensus(3.0, "bucket") for _ in range(3))
    for rows in turning(SHARED):
        for key, those in {"turned": rows, "fine": 1 + 0.1 * rows.abs()}.items():
            saved.decide([key], saved.measure(key, those), ConsensusAgreement(), 10.0)
        saved.finish()
    again.load(saved.dump(30))
    judge.load(again.dump(30))
    rows = turning(1)[0]
    for keys in (["all"], ["turned", "fine"]):
        found = step(judge, keys, rows)
    assert [turned(each) for each in found] == [[1], []]
