"""The fold: what it keeps of real kinds of gradients, and all its ways against explicit signs in float64."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

from gaf_ddp import sketch
from gaf_ddp.kernels.fold import block_length, fold, key_of, mix, period_of, sign_table, signs
from tests.kernels import spilled_bytes
from tests.syncs import HostSyncs

CPU = torch.device("cpu")
SIZES = (64, 100, 1000, 4096)
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = torch.cuda.is_available() and not interpreted
DEVICE = torch.device("cuda" if on_gpu else "cpu")
outside_the_interpreter = pytest.mark.skipif(interpreted, reason="needs no interpreter")


def lengths(size: int) -> list[int]:
    """Return lengths N at which a fold may trip, up to several blocks."""
    return [0, 1, size - 1, size, size + 1, 10 * size + 3, block_length(size), 2 * block_length(size) + 12_345]


def fold_reference(x: Tensor, size: int, seed: int) -> Tensor:
    """Return the sketch `(k,)` in float64, element by element as sketch.py defines it."""
    folded, period, block = torch.zeros(size, dtype=torch.float64), period_of(size), block_length(size)
    table = sign_table(block, torch.float64, CPU)
    for first, piece in enumerate(torch.split(x.double(), block)):
        number = mix(first ^ key_of(seed))
        shift, own = (number >> 1) % (3 * block), 1 - 2 * (number & 1)
        places = torch.arange(len(piece)) % period
        folded.index_add_(0, places, own * table[shift : shift + len(piece)] * piece)
    return folded


def assert_near(found: tuple[Tensor, Tensor], x: Tensor, size: int, seed: int) -> None:
    """The sketch equals the reference to 1e-6 of its length, the squared norm to 1e-6 of itself."""
    expected = fold_reference(x, size, seed)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.float64
    assert found[0].shape == (size,)
    assert (found[0].double() - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(found[1], x.double().square().sum(), rtol=1e-6, atol=0)


@outside_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", [sketch._fold_on_cpu, sketch._fold_on_accelerator])
@pytest.mark.parametrize("size", SIZES)
def test_each_way_is_the_reference(
    size: int, way: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    for length in lengths(size):
        x = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
        assert_near(way(x, size, seed=3), x, size, seed=3)


@outside_the_interpreter
def test_pieces_of_the_accelerators_way_are_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "_ON_ACCELERATOR", 3 * block_length(64))
    x = torch.randn(7 * block_length(64) + 77)
    with HostSyncs() as syncs:
        found = sketch._fold_on_accelerator(x, 64, 1)
    assert syncs.calls == []
    assert_near(found, x, 64, seed=1)


@outside_the_interpreter
def test_signs_are_signs_that_differ_by_element_block_and_seed() -> None:
    length = block_length(4096)
    some = signs(5 * length, 4096, 0, CPU).double()
    assert set(some.tolist()) == {-1.0, 1.0}
    assert torch.equal(signs(2 * length, 4096, 0, CPU, first=3).double(), some[3 * length :])
    others = [signs(5 * length, 4096, seed, CPU).double() for seed in (1, 2)]
    for a, b in ((some[:length], some[length : 2 * length]), (some, others[0]), (others[0], others[1])):
        assert abs((a @ b).item()) < 5 * len(a) ** 0.5
    for lag in (1, 2, 8, 64, 1024, period_of(4096)):
        assert abs((some[:-lag] @ some[lag:]).item()) < 5 * len(some) ** 0.5


@outside_the_interpreter
@pytest.mark.parametrize(("size", "period"), [(64, 61), (100, 97), (101, 101), (1024, 1021), (4096, 4093)])
def test_the_period_is_a_prime(size: int, period: int) -> None:
    assert period_of(size) == period


@outside_the_interpreter
def test_the_sketch_is_pinned() -> None:
    """What saved momenta of sketches depend on."""
    found, _ = fold(torch.arange(300_000) % 7 + 1.0, 64, seed=5)
    assert found[:6].tolist() == [232, 106, 306, -348, -67, -117]


@outside_the_interpreter
def test_it_is_linear() -> None:
    x, y = torch.randn(2, 400_000)
    left, right = fold(2 * x - 3 * y, 1000, 0)[0], 2 * fold(x, 1000, 0)[0] - 3 * fold(y, 1000, 0)[0]
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * right.norm().item() / 1000**0.5)


# What it keeps.


def _normal(*shape: int, seed: int = 0) -> Tensor:
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
    return list(_normal(6, 500_000))


def outer_products() -> list[Tensor]:
    """Rank one, with activations as behind a ReLU."""
    units, deltas = _normal(6, 1024, seed=1).relu(), _normal(6, 700, seed=2)
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
    generator, direction, found = torch.Generator().manual_seed(0), _normal(128), []
    for i in range(6):
        table = torch.zeros(5000, 128)
        table[torch.randint(5000, (64,), generator=generator)] = direction + 0.2 * _normal(64, 128, seed=i)
        found.append(table.flatten())
    return found


KINDS = [gaussian, outer_products, mlp_of_batch_1, residual_convolutions, transformer, embedding_rows]


@outside_the_interpreter
@pytest.mark.parametrize("size", [256, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_an_error_of_one_over_root_k(
    kind: Callable[[], list[Tensor]], size: int
) -> None:
    unit = functional.normalize(torch.stack(kind()).double())
    exact, seeds = unit @ unit.T, 16
    sketches = [torch.stack([fold(x.float(), size, seed)[0] for x in unit]).double() for seed in range(seeds)]
    pairs = torch.triu_indices(len(unit), len(unit), 1).unbind()
    errors = torch.stack([(s @ s.T - exact)[pairs] for s in sketches]) * size**0.5  # (seeds, pairs)
    # Over 240 draws the root mean square of an error of 1 is 1 ± 0.05, and its mean is 0 ± 0.065. The signs of one
    # seed serve all its pairs, and the error of x · y is √(1 + cos²)/√k: 0.88 to 1.05 were the values seen.
    assert errors.square().mean().sqrt() <= 1.2
    assert errors.mean().abs() <= 4 * errors.mean(1).std() / seeds**0.5
    lengths = torch.stack([s.square().sum(1) - 1 for s in sketches]) * size**0.5
    assert lengths.square().mean().sqrt() <= 1.2 * 2**0.5


@outside_the_interpreter
def test_near_gradients_keep_their_distance() -> None:
    """To √(2/k) of the distance itself, however small: sketches are to be compared with sketches."""
    common, noise = 100 * _normal(300_000), _normal(2, 300_000, seed=1)
    sketches = [fold(common + n, 4096, 0)[0].double() for n in noise]
    exact = (noise[0] - noise[1]).double().norm()
    assert abs((sketches[0] - sketches[1]).norm() / exact - 1) < 4 / (2 * 4096) ** 0.5


@outside_the_interpreter
def test_buckets_of_other_seeds_add_up_in_any_order() -> None:
    parts = [torch.split(x, [100_000, 250_000, 50_000]) for x in _normal(2, 400_000)]
    folded = [[fold(p, 4096, seed)[0].double() for seed, p in enumerate(part)] for part in parts]
    sums = [f[0] + f[1] + f[2] for f in folded]
    torch.testing.assert_close(sums[0], folded[0][2] + folded[0][0] + folded[0][1])
    exact = torch.dot(torch.cat(parts[0]), torch.cat(parts[1])).item()
    assert abs(sums[0] @ sums[1] - exact) < 4 * 400_000 / 4096**0.5
    # A layer under the same signs as another that sees the same would look like it.
    same = fold(parts[0][0], 4096, 0)[0], fold(parts[0][0], 4096, 1)[0]
    assert abs(torch.dot(*same)) < 5 * 100_000 / 4096**0.5


# The edges.


@outside_the_interpreter
@pytest.mark.parametrize("way", [sketch._fold_on_cpu, sketch._fold_on_accelerator])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e15, 1e30])
def test_norms_beyond_the_squares_of_float32(scale: float, way: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = scale * _normal(300_000)
    assert_near(way(x, 100, 0), x, 100, 0)
    x[1000:] = 0
    assert_near(way(x, 100, 0), x, 100, 0)
    x[-5:] = 1.0  # a block of one and blocks of the other
    assert_near(way(x, 100, 0), x, 100, 0)


@outside_the_interpreter
@pytest.mark.parametrize("way", [sketch._fold_on_cpu, sketch._fold_on_accelerator])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_both(bad: float, way: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = _normal(300_000).to(dtype)
        x[270_001] = bad
        folded, square = way(x, 100, 0)
        assert not square.isfinite()
        assert folded.isfinite().logical_not().nonzero().flatten().tolist() == [270_001 % block_length(100) % 97]


@outside_the_interpreter
def test_zeros_have_a_sketch_of_zeros() -> None:
    folded, square = fold(torch.zeros(300_000), 100, 0)
    assert not folded.any()
    assert square == 0


@outside_the_interpreter
@pytest.mark.parametrize("x", [torch.ones(3, 3), torch.ones(3, dtype=torch.int64), torch.tensor(1.0)])
def test_what_is_no_vector_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x must be a floating point vector \(N,\), found "):
        fold(x, 64, 0)


@outside_the_interpreter
@pytest.mark.parametrize("size", [63, 0, -4096])
def test_a_size_that_says_too_little_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be at least 64 numbers, found {size}"):
        fold(torch.ones(3), size, 0)


# In Triton.

triton = pytest.importorskip("triton")
needs_kernels = pytest.mark.skipif(not (interpreted or on_gpu), reason="runs in the interpreter or on a GPU")
# Triton 3.6's interpreter converts arrays of one element to scalars, which NumPy 2.4 refuses; 3.9's does not.
unlucky_pair = Version(triton.__version__) < Version("3.9") and Version(np.__version__) >= Version("2.4")


@outside_the_interpreter
@pytest.mark.skipif(unlucky_pair, reason="this Triton's interpreter needs an older NumPy")
@pytest.mark.job
def test_values_in_the_interpreter() -> None:
    """The kernel's values, below, with TRITON_INTERPRET=1, which Triton reads when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", "kernel", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_is_the_reference(size: int, dtype: torch.dtype) -> None:
    from gaf_ddp import _triton_sketch

    several_blocks = size == 4096 and dtype == torch.float32  # the interpreter is slow
    for length in lengths(size) if several_blocks else lengths(size)[:-2]:
        x = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
        assert _triton_sketch.can_fold(x)
        folded, square = _triton_sketch.fold(x.to(DEVICE), size, 3)
        assert_near((folded.cpu(), square.cpu()), x, size, seed=3)


@needs_kernels
def test_the_kernel_at_the_edges() -> None:
    from gaf_ddp import _triton_sketch

    for scale in (1e-30, 1e30):
        x = scale * _normal(20_000)
        folded, square = _triton_sketch.fold(x.to(DEVICE), 100, 0)
        assert_near((folded.cpu(), square.cpu()), x, 100, 0)
    for bad in (math.nan, math.inf):
        x = _normal(20_000)
        x[777] = bad
        folded, square = _triton_sketch.fold(x.to(DEVICE), 100, 0)
        assert not square.isfinite()
        assert folded.isfinite().logical_not().nonzero().flatten().tolist() == [777 % 97]


@outside_the_interpreter
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spilling(capability: int, dtype: str, tmp_path: Path) -> None:
    """By Triton's compiler and its bundled assembler, which reports spills; no GPU is needed."""
    from gaf_ddp import _triton_sketch

    types = {
        "x": f"*{dtype}",
        "table": "*i8",
        "partial": "*fp32",
        "squares": "*fp64",
        "count": "i32",
        "key": "i32",
    }
    for size in SIZES:
        constants, kernel = _triton_sketch.constants(size), _triton_sketch._fold_kernel
        assert spilled_bytes(kernel, types, constants, _triton_sketch.WARPS, capability, tmp_path) == 0
