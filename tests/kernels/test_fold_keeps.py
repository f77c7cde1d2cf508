"""What sketches keep of real kinds of gradients: inner products, lengths, and distances."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gaf_ddp.kernels.fold import Span, fold, whole
from gaf_ddp.kernels.signs import block_length

DRAWS = 16


def elsewhere(x: Tensor, size: int, draw: int) -> Tensor:
    """Return the sketch `(k,)` float64 of x at another place of the model, where signs are others."""
    return fold(x, (Span(0, draw * 1000 * block_length(size) + 77 * draw, len(x)),), size)[0].double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gradients(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the flat gradient of each batch's cross entropy."""
    found = []
    for x, y in batches:
        net.zero_grad()
        functional.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    return found


def _classes(count: int, *shape: int) -> list[tuple[Tensor, Tensor]]:
    """Return count batches of images in [0, 1] and their classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(shape, generator=generator), torch.randint(10, shape[:1], generator=generator))
        for _ in range(count)
    ]


def gaussian() -> list[Tensor]:
    return list(normal(6, 500_000))


def outer_products() -> list[Tensor]:
    """Rank one, with activations as behind a ReLU."""
    units, deltas = normal(6, 1024, seed=1).relu(), normal(6, 700, seed=2)
    return [torch.outer(d, u).flatten() for d, u in zip(deltas, units, strict=True)]


def mlp_of_batch_1() -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    return _gradients(net, _classes(6, 1, 1, 28, 28))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.path(x))


def residual_convolutions() -> list[Tensor]:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    net = nn.Sequential(nn.Conv2d(3, 64, 3), _Block(64), nn.Conv2d(64, 128, 3, 2), nn.ReLU(), _Block(128), head)
    return _gradients(net, _classes(6, 4, 3, 16, 16))


def transformer() -> list[Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0, batch_first=True)
    net = nn.Sequential(nn.Embedding(500, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 500))
    words = torch.randint(500, (6, 2, 17), generator=torch.Generator().manual_seed(0))
    return _gradients(net, [(w[:, :-1], w[:, 1:]) for w in words])


def embedding_rows() -> list[Tensor]:
    """Few rows, all in about one direction, at a width that divides 4096."""
    generator, direction, found = torch.Generator().manual_seed(0), normal(128), []
    for i in range(6):
        table = torch.zeros(5000, 128)
        table[torch.randint(5000, (64,), generator=generator)] = direction + 0.2 * normal(64, 128, seed=i)
        found.append(table.flatten())
    return found


KINDS = [gaussian, outer_products, mlp_of_batch_1, residual_convolutions, transformer, embedding_rows]


@pytest.mark.parametrize("size", [256, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_an_error_of_one_over_root_k(
    kind: Callable[[], list[Tensor]], size: int
) -> None:
    unit = functional.normalize(torch.stack(kind()).double())
    exact = unit @ unit.T
    sketches = [torch.stack([elsewhere(x.float(), size, draw) for x in unit]) for draw in range(DRAWS)]
    pairs = torch.triu_indices(len(unit), len(unit), 1).unbind()
    errors = torch.stack([(s @ s.T - exact)[pairs] for s in sketches]) * size**0.5  # (draws, pairs)
    # Over 240 draws the root mean square of an error of 1 is 1 ± 0.05, and its mean is 0 ± 0.065. The signs of one
    # place serve all its pairs, and the error of x · y is √(1 + cos²)/√k: 0.91 to 1.07 were the values seen.
    assert errors.square().mean().sqrt() <= 1.2
    assert errors.mean().abs() <= 4 * errors.mean(1).std() / DRAWS**0.5
    lengths = torch.stack([s.square().sum(1) - 1 for s in sketches]) * size**0.5
    assert lengths.square().mean().sqrt() <= 1.2 * 2**0.5


def test_near_gradients_keep_their_distance() -> None:
    """To √(2/k) of the distance itself, however small: sketches are to be compared with sketches."""
    common, noise = 100 * normal(300_000), normal(2, 300_000, seed=1)
    sketches = [fold(common + n, whole(300_000), 4096)[0].double() for n in noise]
    exact = (noise[0] - noise[1]).double().norm()
    assert abs((sketches[0] - sketches[1]).norm() / exact - 1) < 4 / (2 * 4096) ** 0.5


def test_it_is_linear() -> None:
    x, y = normal(2, 400_000)
    left = fold(2 * x - 3 * y, whole(400_000), 1000)[0]
    right = 2 * fold(x, whole(400_000), 1000)[0] - 3 * fold(y, whole(400_000), 1000)[0]
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * right.norm().item() / 1000**0.5)


@pytest.mark.parametrize("distance", [100_000, 2**17, 1021 * 1000, block_length(4096), 7 * block_length(4096)])
def test_layers_that_are_alike_do_not_look_alike(distance: int) -> None:
    """A layer under the same signs as another that sees the same would."""
    x = normal(100_000)
    here, there = (fold(x, (Span(0, place, len(x)),), 4096)[0].double() for place in (0, distance))
    assert abs(here @ there) < 5 * len(x) / 4096**0.5
