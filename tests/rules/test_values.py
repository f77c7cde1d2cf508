"""One pinned table: what every weighting says about the same six gradients."""

import pytest
import torch

from gaf_ddp import Mean, NeighborhoodAgreement, SequentialAgreement, Weighting

NAN = float("nan")

# In the plane, by angle and length; rank 2 is not finite, rank 4 zero. Distances to rank 1: 0.13 (rank 0, 30
# degrees), 0.5 (rank 3, 60 degrees), 2 (rank 5, 180 degrees). Rank 0 to rank 3: 1.
#   rank 0: 1 at 30 degrees, rank 1: 2 at 0, rank 3: 1 at -60, rank 5: 3 at 180
GRADIENTS = torch.tensor(
    [[3**0.5 / 2, 0.5], [2.0, 0.0], [NAN, 1.0], [0.5, -(3**0.5) / 2], [0.0, 0.0], [-3.0, 0.0]],
    dtype=torch.float64,
)

# Sequential visits 0, 1, 3, 5. Rank 1 is 0.13 from rank 0. Then v = (1.433, 0.25) is at distance 0.655 from rank 3
# as the mean and as the half; with rank 3, v = (1.122, -0.122) and (0.966, -0.308): rank 5 is 1.99 and 1.95 off.
TABLE = [
    (Mean(), [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4]),
    (NeighborhoodAgreement(0.1), [0, 0, 0, 0, 0, 0]),
    (NeighborhoodAgreement(0.2), [1 / 2, 1 / 2, 0, 0, 0, 0]),
    (NeighborhoodAgreement(0.6), [1 / 3, 1 / 3, 0, 1 / 3, 0, 0]),
    (NeighborhoodAgreement(1.7), [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4]),
    (NeighborhoodAgreement(2.0), [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4]),
    (SequentialAgreement(0.1), [0, 0, 0, 0, 0, 0]),
    (SequentialAgreement(0.65), [1 / 2, 1 / 2, 0, 0, 0, 0]),
    (SequentialAgreement(0.66), [1 / 3, 1 / 3, 0, 1 / 3, 0, 0]),
    (SequentialAgreement(1.97), [1 / 3, 1 / 3, 0, 1 / 3, 0, 0]),
    (SequentialAgreement(2.0), [1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4]),
    (SequentialAgreement(0.1, running="half"), [0, 0, 0, 0, 0, 0]),
    (SequentialAgreement(0.65, running="half"), [1 / 2, 1 / 2, 0, 0, 0, 0]),
    (SequentialAgreement(0.66, running="half"), [1 / 4, 1 / 4, 0, 1 / 2, 0, 0]),
    (SequentialAgreement(1.97, running="half"), [1 / 8, 1 / 8, 0, 1 / 4, 0, 1 / 2]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("weighting", "weights"), TABLE, ids=[repr(weighting) for weighting, _ in TABLE])
def test_the_weights_are_these(weighting: Weighting, weights: list[float], dtype: torch.dtype) -> None:
    gramian = (GRADIENTS @ GRADIENTS.T).to(dtype)
    torch.testing.assert_close(weighting(gramian), torch.tensor(weights, dtype=dtype), rtol=1e-6, atol=0)
