"""MicrobatchFilter on models: layouts, dtypes, frozen and unused parameters, uneven batches, GradScaler."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from gaf_ddp import MicrobatchFilter, SequentialAgreement, filter_gradients
from tests.nets import Probe, flat_gradients
from tests.oracle import assert_close

Running = Literal["mean", "half"]

SIZES = [60, 7, 133]

every_running = pytest.mark.parametrize("running", ["mean", "half"])


class Picky(nn.Module):
    """Convolutions, a frozen layer, and a layer that only some micro-batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.frozen, self.sometimes = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, detour: bool) -> Tensor:
        x = self.frozen(self.conv(x).mean((2, 3)))
        return (self.sometimes(x) if detour else x).square().mean()


def stacked(module: nn.Module, backward: Callable[[int], None], count: int) -> Tensor:
    """Return each micro-batch's gradient of the trained parameters as `(count, N)`, zero where there is none."""
    rows = []
    for i in range(count):
        module.zero_grad()
        backward(i)
        trained = [p for p in module.parameters() if p.requires_grad]
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]))
    module.zero_grad()
    return torch.stack(rows)


@every_running
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_model_is_filtered_alike(running: Running, memory_format: Any, dtype: torch.dtype) -> None:
    model = Picky().to(dtype).to(memory_format=memory_format)
    generator = torch.Generator().manual_seed(1)
    sizes = [2, 5, 1, 3]  # uneven: each counts the same
    inputs = [torch.randn(size, 3, 8, 8, generator=generator).to(dtype) for size in sizes]

    def backward(i: int) -> None:
        model(inputs[i].to(memory_format=memory_format), detour=i % 2 == 1).backward()

    expected = filter_gradients(stacked(model, backward, 4).double(), SequentialAgreement(1.2, running=running))
    assert expected.any()
    micro = MicrobatchFilter(model.parameters(), tau=1.2, running=running)
    for i in range(4):
        backward(i)
        micro.accumulate()
    assert micro.finish()
    assert all(p.grad is None for p in model.frozen.parameters())
    for p in model.parameters():
        assert p.grad is None or (p.grad.dtype == p.dtype and p.grad.stride() == p.stride())
    # Sums are float32 for bfloat16 too, and rounded once at the end.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float64: 1e-12}[dtype]
    assert_close(flat_gradients(model), expected, tolerance)


def test_sums_of_half_precision_stay_in_float32() -> None:
    probe = Probe([4], [torch.bfloat16])
    micro = MicrobatchFilter(probe.parameters(), 2.0)
    for value in (256.0, 1.0, 1.0, 1.0):
        probe(torch.full((4,), value)).backward()
        micro.accumulate()
    assert micro.finish()
    assert flat_gradients(probe).tolist() == [65.0] * 4  # 64.75, rounded once; one by one it is 64


@every_running
def test_grad_scaler_backs_off_on_overflow(running: Running) -> None:
    probe = Probe(SIZES)
    before = [p.detach().clone() for p in probe.parameters()]
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    micro = MicrobatchFilter(probe.parameters(), running=running)
    for value in (torch.inf, 1.0):
        for _ in range(2):
            scaler.scale(probe(torch.full((sum(SIZES),), value))).backward()
            micro.accumulate()
        if micro.finish() or micro.overflowed:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if value == torch.inf:
            assert all(torch.equal(p, q) for p, q in zip(probe.parameters(), before, strict=True))
    assert scaler.get_scale() == 512
    for p, q in zip(probe.parameters(), before, strict=True):
        torch.testing.assert_close(p, q - 0.1, rtol=0, atol=1e-6)
