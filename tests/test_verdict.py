"""One decision, taken once, whoever asks first; and the averages by it."""

import pytest
import torch
from torch import Tensor

from gaf_ddp import Mean, combine, gram
from gaf_ddp.agreement import decide
from gaf_ddp.verdict import Verdict
from tests.gradients import random_gradients


class Counted(Mean):
    """Counts how often it is asked."""

    calls = 0

    def __call__(self, gramian: Tensor) -> Tensor:
        self.calls += 1
        return super().__call__(gramian)


@pytest.mark.parametrize("record_first", [True, False])
def test_it_decides_once(record_first: bool) -> None:
    rows, rule = random_gradients(3, 100), Counted()
    rows[1] = torch.nan
    verdict = Verdict(gram(rows), rule, 10.0)
    assert rule.calls == 0
    if record_first:
        assert verdict.agreement.kept.tolist() == [True, False, True]
    average, again = verdict.combine(rows), verdict.combine(rows, out=torch.empty(100))
    assert rule.calls == 1
    assert verdict.agreement.kept.tolist() == [True, False, True]
    assert torch.equal(verdict.weights, decide(gram(rows), Mean(), 10.0).weights)
    assert torch.equal(average, combine(rows, verdict.weights))
    assert torch.equal(again, average)


def test_it_writes_where_it_is_asked_to() -> None:
    rows = list(random_gradients(2, 10))
    out = rows[0]
    expected = combine([row.clone() for row in rows], torch.tensor([0.5, 0.5]))
    assert Verdict(gram(rows), Mean(), None).combine(rows, out=out) is out
    assert torch.equal(out, expected)


def test_what_the_weighting_raises_comes_out_of_the_first_use() -> None:
    def broken(gramian: Tensor) -> Tensor:
        raise LookupError("no weights today")

    verdict = Verdict(torch.eye(2), broken, None)
    for _ in range(2):
        with pytest.raises(LookupError, match="no weights today"):
            verdict.combine(torch.ones(2, 5))
