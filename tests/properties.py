"""What must hold for weightings, as assertions over one weighting and one matrix of gradients `(W, n)`."""

import torch
from torch import Tensor

from gaf_ddp import Weighting
from tests.syncs import HostSyncs


def gramian_of(gradients: Tensor) -> Tensor:
    """Return the Gramian `(W, W)` in float64, to keep rounding out of tests of rules."""
    return gradients.double() @ gradients.double().T


def assert_convex(weighting: Weighting, gramian: Tensor) -> None:
    """Weights are shares: none negative, and they sum to 1, or all are 0."""
    weights = weighting(gramian)
    assert weights.shape == (len(gramian),)
    assert (weights >= 0).all()
    assert weights.sum().item() == 0 or abs(weights.sum().item() - 1) < 1e-6


def assert_pure(weighting: Weighting, gramian: Tensor) -> None:
    """The same Gramian gives the same bits, is left as it was, keeps its dtype, and the host never waits."""
    before = gramian.clone()
    with HostSyncs() as syncs:
        weights = weighting(gramian)
    assert syncs.calls == []
    assert torch.equal(gramian.nan_to_num(), before.nan_to_num())
    assert torch.equal(weighting(gramian), weights)
    assert weights.dtype == gramian.dtype


def assert_permutation_equivariant(weighting: Weighting, gramian: Tensor, order: Tensor) -> None:
    """Renumbering the ranks renumbers their weights."""
    torch.testing.assert_close(weighting(gramian[order][:, order]), weighting(gramian)[order])


def assert_scale_invariant(weighting: Weighting, gramian: Tensor, factor: float) -> None:
    """Multiplying all gradients by a number changes no weight."""
    torch.testing.assert_close(weighting(gramian * factor**2), weighting(gramian), rtol=1e-6, atol=0)


def assert_row_scale_invariant(weighting: Weighting, gramian: Tensor, factors: Tensor) -> None:
    """Multiplying each gradient by a positive number of its own changes no weight."""
    scaled = gramian * factors[:, None] * factors[None, :]
    torch.testing.assert_close(weighting(scaled), weighting(gramian), rtol=1e-6, atol=0)


def assert_blind_to_absent(weighting: Weighting, gramian: Tensor, rank: int, entry: float) -> None:
    """A rank with entry (0, NaN, inf) in its row and column gets 0 and changes nothing for the others."""
    others = [i for i in range(len(gramian) + 1) if i != rank]
    wider = gramian.new_full((len(gramian) + 1, len(gramian) + 1), entry)
    wider[torch.tensor(others)[:, None], torch.tensor(others)] = gramian
    weights = weighting(wider)
    assert weights[rank].item() == 0
    assert torch.equal(weights[others], weighting(gramian))


def assert_keeps(weighting: Weighting, gramian: Tensor, kept: list[int]) -> None:
    """The ranks with a weight other than 0 are these."""
    assert weighting(gramian).nonzero().flatten().tolist() == kept
