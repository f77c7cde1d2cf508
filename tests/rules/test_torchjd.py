"""TorchJD's weightings over the ranks equal TorchJD's aggregators on the stacked gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd.aggregation import (
    MGDA,
    Krum,
    KrumWeighting,
    Mean,
    MeanWeighting,
    MGDAWeighting,
    UPGrad,
    UPGradWeighting,
)

from tests.following import follow
from tests.gradients import random_gradients
from tests.oracle import assert_close

Ranks = Callable[..., list[Any]]

W, SIZES = 5, [300, 7, 200]
TOLERANCE = 1e-5  # of the gradient's norm; errors seen were up to 5e-7, as the Gramians differ by rounding
CASES = {
    "UPGrad": (UPGradWeighting(), UPGrad()),
    "MGDA": (MGDAWeighting(), MGDA()),
    "Krum": (KrumWeighting(n_byzantine=1, n_selected=2), Krum(n_byzantine=1, n_selected=2)),
    "Mean": (MeanWeighting(), Mean()),
}


def some_steps() -> tuple[Tensor, list[list[int]]]:
    """Return gradients `(steps, W, N)` with nobody absent, a zero rank and a NaN rank, and who is present."""
    steps = torch.stack([random_gradients(W, sum(SIZES), seed) for seed in range(4)])
    steps[2, 0], steps[3, 3] = 0, torch.nan
    everyone = list(range(W))
    return steps, [everyone, everyone, [1, 2, 3, 4], [0, 1, 2, 4]]


def follow_all(device: torch.device, gradients: Tensor) -> dict[str, Tensor]:
    return {
        name: follow(device, gradients, SIZES, {"weighting": weighting, "scope": "model"}).gradients
        for name, (weighting, _) in CASES.items()
    }


def test_weightings_equal_the_aggregators(ranks: Ranks) -> None:
    gradients, present = some_steps()
    outcomes = ranks(W, follow_all, gradients)
    for name, (_, aggregator) in CASES.items():
        for step, who in enumerate(present):
            assert_close(outcomes[0][name][step], aggregator(gradients[step, who]), TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_weightings_differ_on_these_gradients(name: str) -> None:
    # Else the test above could not tell them apart.
    gradients, _ = some_steps()
    results = [aggregator(gradients[0]) for _, aggregator in CASES.values()]
    own = CASES[name][1](gradients[0])
    assert sum(bool((own - other).norm() < 0.05 * own.norm()) for other in results) == 1
