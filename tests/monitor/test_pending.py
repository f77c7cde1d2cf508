"""Records on their way to the host: what comes out is what went in, in its order, and nobody waits before."""

from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from gaf_ddp import Agreement
from gaf_ddp.monitor.pending import Pending
from gaf_ddp.runtime import device as devices
from tests.monitor.decisions import random_steps, some_decisions
from tests.syncs import HostSyncs


@pytest.fixture(params=["host", "accelerator"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return the CPU, once as it is and once as it passes for an accelerator."""
    if request.param == "accelerator":
        monkeypatch.setattr(devices, "_HOST", "no device")
    return torch.device("cpu")


def assert_equal(found: Sequence[Agreement], expected: Sequence[Agreement]) -> None:
    """Assert that records are the same, bits, dtypes and shapes."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in fields(Agreement):
            read, given = getattr(one, field.name), getattr(other, field.name)
            assert (read is None) == (given is None), field.name
            if given is not None:
                assert (read.dtype, read.shape) == (given.dtype, given.shape), field.name
                assert torch.equal(read.double().nan_to_num(-7), given.double().nan_to_num(-7)), field.name
                assert torch.equal(read.isnan(), given.isnan()), field.name


def numbers_of(decisions: Sequence[Agreement], seed: int) -> list[Tensor]:
    """Return two numbers of each rank for each decision, such as `Fingerprints` are."""
    generator = torch.Generator().manual_seed(seed)
    size = len(decisions[0].kept)
    return [torch.randint(2**48, (size,), generator=generator).double() for _ in range(2 * len(decisions))]


@pytest.mark.parametrize("world_size", [1, 4, 33])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_what_comes_out_is_what_went_in(device: torch.device, world_size: int, ahead: int) -> None:
    reading, waiting = Pending(), []
    for step, decisions in random_steps(world_size, 40, 0).items():
        numbers = numbers_of(decisions, step)
        reading.push(step, decisions, numbers)
        waiting.append((step, decisions, numbers))
        while len(waiting) > ahead:
            expected_step, expected, told = waiting.pop(0)
            found_step, found, found_told = reading.pop()
            assert found_step == expected_step
            assert_equal(found, expected)
            assert [each.tolist() for each in found_told] == [each.tolist() for each in told]
        assert len(reading) == len(waiting)


def test_records_of_all_dtypes_keep_them(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        gramian = torch.randn(4, 4, dtype=dtype)
        decisions = [Agreement(**{**vars(each), "gramian": gramian}) for each in some_decisions()]
        reading = Pending()
        reading.push(3, decisions, numbers_of(decisions, 0))
        assert_equal(reading.pop()[1], decisions)


def test_what_is_under_way_is_a_copy(device: torch.device) -> None:
    reading, decisions = Pending(), some_decisions()
    told = torch.ones(4)
    reading.push(0, decisions, [told])
    kept = decisions[0].kept.clone()
    decisions[0].kept.zero_()  # as an optimizer or the next step may
    told.zero_()
    _, found, numbers = reading.pop()
    assert torch.equal(found[0].kept, kept)
    assert numbers[0].tolist() == [1.0] * 4


def test_nobody_waits_for_the_device_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_HOST", "no device")
    reading, decisions = Pending(), some_decisions()
    with HostSyncs() as syncs:
        for step in range(3):
            reading.push(step, decisions, numbers_of(decisions, step))
    assert syncs.calls == []


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    reading, pushed = Pending(), []
    for step, decisions in random_steps(5, 20, 1).items():
        fields_of = ({name: value for name, value in vars(each).items() if value is not None} for each in decisions)
        moved = [Agreement(**{name: value.cuda() for name, value in known.items()}) for known in fields_of]
        reading.push(step, moved, [each.cuda() for each in numbers_of(decisions, step)])
        pushed.append(decisions)
    for decisions in pushed:
        _, found, _ = reading.pop()
        assert {each.kept.device.type for each in found} == {"cpu"}
        assert_equal(found, decisions)
