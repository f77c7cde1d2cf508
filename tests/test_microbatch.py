"""MicrobatchFilter: the sequential rule, streaming, over what autograd leaves in `p.grad`."""

import gc
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from gaf_ddp import MicrobatchFilter, SequentialAgreement, filter_gradients
from tests import oracle
from tests.gradients import agreeing_gradients, random_gradients
from tests.nets import Probe, flat_gradients
from tests.syncs import HostSyncs

Running = Literal["mean", "half"]

SIZES = [60, 7, 133]
every_running = pytest.mark.parametrize("running", ["mean", "half"])


def filtered(gradients: Tensor, tau: float = 1.0, running: Running = "mean") -> tuple[Probe, bool]:
    """Fold gradients `(micro-batches, N)` in; return the module and whether to step."""
    probe = Probe(SIZES)
    micro = MicrobatchFilter(probe.parameters(), tau, running=running)
    for gradient in gradients:
        probe(gradient).backward()
        micro.accumulate()
        assert all(p.grad is None for p in probe.parameters())
    return probe, micro.finish()


def assert_filtered(gradients: Tensor, tau: float, running: Running) -> None:
    """Assert that what comes out is the oracle's gradient; the norm guard is for ranks."""
    expected = oracle.filtered(list(gradients), oracle.sequential(tau, running), max_norm_ratio=None)
    probe, agreed = filtered(gradients, tau, running)
    assert agreed == (len(expected.kept) > 0)
    if agreed:
        oracle.assert_close(flat_gradients(probe), expected.gradient, 1e-5)
    else:
        assert all(p.grad is None for p in probe.parameters())


@every_running
@pytest.mark.parametrize("tau", [0.5, 0.8, 1.1, 2.0])
def test_equals_the_oracle(running: Running, tau: float) -> None:
    for count in (1, 2, 3, 4, 7):
        for seed in range(5):
            assert_filtered(random_gradients(count, sum(SIZES), seed), tau, running)


@every_running
def test_equals_the_weighting_on_stacked_gradients(running: Running) -> None:
    for seed in range(5):
        gradients = random_gradients(5, sum(SIZES), seed)
        probe, agreed = filtered(gradients, 0.8, running)
        result = filter_gradients(gradients, SequentialAgreement(0.8, running=running))
        if agreed:
            oracle.assert_close(flat_gradients(probe), result.double(), 1e-5)
        else:
            assert not result.any()


@every_running
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("where", range(4))
def test_a_micro_batch_without_a_vote_does_not_count(running: Running, bad: float, where: int) -> None:
    gradients = agreeing_gradients(4, sum(SIZES))
    if bad == 0:
        gradients[where] = 0
    else:
        gradients[where, 5] = bad
    assert_filtered(gradients, 0.8, running)


@every_running
class TestNobodyVotes:
    def test_all_zero_is_a_step_of_zero(self, running: Running) -> None:
        probe, agreed = filtered(torch.zeros(3, sum(SIZES)), 0.8, running)
        assert agreed
        assert flat_gradients(probe).tolist() == [0.0] * sum(SIZES)

    @pytest.mark.parametrize("gradients", [torch.full((2, sum(SIZES)), math.nan), torch.zeros(2, sum(SIZES))])
    def test_nan_without_a_voter_is_nan_for_grad_scaler(self, running: Running, gradients: Tensor) -> None:
        gradients[0, 3] = math.inf
        probe = Probe(SIZES)
        micro = MicrobatchFilter(probe.parameters(), running=running)
        for gradient in gradients:
            probe(gradient).backward()
            micro.accumulate()
        assert not micro.finish()
        assert micro.overflowed
        assert flat_gradients(probe).isnan().all()
        probe.zero_grad()
        probe(torch.ones(sum(SIZES))).backward()  # and the next step is a new one
        micro.accumulate()
        assert micro.finish()
        assert not micro.overflowed


@every_running
def test_steps_do_not_know_of_each_other(running: Running) -> None:
    probe = Probe(SIZES)
    micro = MicrobatchFilter(probe.parameters(), 0.8, running=running)
    for seed in range(4):
        gradients = random_gradients(3, sum(SIZES), seed)
        for gradient in gradients:
            probe(gradient).backward()
            micro.accumulate()
        agreed = micro.finish()
        fresh, expected = filtered(gradients, 0.8, running)
        assert agreed == expected
        if agreed:
            assert torch.equal(flat_gradients(probe), flat_gradients(fresh))
        probe.zero_grad()


def test_accumulate_never_waits_and_finish_waits_once() -> None:
    probe = Probe(SIZES)
    for running in ("mean", "half"):
        micro = MicrobatchFilter(probe.parameters(), 0.8, running=running)
        for gradient in random_gradients(4, sum(SIZES)):
            probe(gradient).backward()
            with HostSyncs() as syncs:
                micro.accumulate()
            assert syncs.calls == []
        with HostSyncs() as syncs:
            micro.finish()
        assert len(syncs.calls) == 1


def live_elements() -> int:
    """Return how many elements the tensors that Python knows of hold, each memory once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    grads = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in tensors + grads}.values())


def test_holds_one_copy_of_the_gradient() -> None:
    probe = Probe([10_000] * 3)
    micro = MicrobatchFilter(probe.parameters(), 2.0)
    before = live_elements()
    for _ in range(3):
        probe(torch.ones(30_000)).backward()
        micro.accumulate()
    assert live_elements() - before <= 30_000 + 100
    assert micro.finish()
    assert live_elements() - before <= 30_000 + 100  # handed over to p.grad, not copied
    probe.zero_grad()
    assert live_elements() - before <= 100


class TestMisuse:
    def test_accumulate_needs_a_backward(self) -> None:
        micro = MicrobatchFilter(Probe(SIZES).parameters())
        with pytest.raises(RuntimeError, match=r"accumulate\(\) must follow a backward\(\), found no param"):
            micro.accumulate()

    def test_finish_needs_an_accumulate(self) -> None:
        micro = MicrobatchFilter(Probe(SIZES).parameters())
        with pytest.raises(RuntimeError, match=r"finish\(\) must follow at least one accumulate\(\), found none"):
            micro.finish()

    def test_needs_a_parameter_to_train(self) -> None:
        for parameters in ([], [torch.ones(3)]):
            with pytest.raises(ValueError, match="parameters must hold at least one that requires a gradient, f"):
                MicrobatchFilter(parameters)

    @pytest.mark.parametrize("tau", [-0.1, 2.1, math.nan, "1", None, True])
    def test_refuses_a_tau_out_of_range(self, tau: Any) -> None:
        with pytest.raises(ValueError, match=r"tau must be a cosine distance in \[0, 2\], found"):
            MicrobatchFilter(Probe(SIZES).parameters(), tau)

    def test_refuses_an_unknown_running(self) -> None:
        with pytest.raises(ValueError, match="running must be 'mean' or 'half', found 'sum'"):
            MicrobatchFilter(Probe(SIZES).parameters(), running="sum")  # type: ignore[arg-type]
