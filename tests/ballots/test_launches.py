"""How many operations the late hook launches on an accelerator with Triton, counted on the accelerators' way here.

Kernels are replaced by plain functions, and count as their launches; copies between host and device, collectives, and
every operation that torch dispatches to a device count as one. Views and memory count as none, and so does the rule,
which runs on the host.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.ballots import ballot, late, limits, share
from gaf_ddp.ballots.count import Counting
from gaf_ddp.kernels import fold, scale
from tests.accelerator import take_accelerators_way
from tests.gradients import agreeing_gradients
from tests.nets import Probe, ddp

Ranks = Callable[..., list[Any]]

SIZES = [300, 300, 300, 300, 300]  # a bucket each
_NONE = ("empty", "new_empty", "empty_like", "lift_fresh", "detach", "_unsafe_view", "alias", "scalar_tensor")


class Launches(TorchDispatchMode):
    """Counts what would be launched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if not op.is_view and name not in _NONE:
            self.names.append(name)
        return op(*args, **(kwargs or {}))

    def count(self, launches: int, function: Any) -> Any:
        """Return the function, as so many launches."""

        def counted(*args: Any, **options: Any) -> Any:
            self.names += [function.__name__] * launches
            with _disable_current_modes():
                return function(*args, **options)

        return counted


def replace(launches: Launches) -> None:
    """Replace kernels, copies and the host's work, on this rank alone, which ends with its test."""
    of_fold = SimpleNamespace(can_fold=lambda x: True, fold_into=launches.count(2, fold_into))
    of_scale = SimpleNamespace(can_scale=lambda x: True, scale=launches.count(1, scale._scale_on_host))
    of_scale.correct = launches.count(1, correct)
    fold.kernels = lambda kind, name: of_fold  # type: ignore[assignment, attr-defined]
    scale.kernels = lambda kind, name: of_scale  # type: ignore[assignment, attr-defined]
    for module in (ballot, limits, share):
        module.to_device = launches.count(1, module.to_device)  # type: ignore[attr-defined]
    draw, tally = late.LateFilter.draw, Counting._count

    def on_host(self: Any) -> None:
        with _disable_current_modes():
            draw(self)

    def on_device(self: Any) -> Any:
        launches.names += ["copies to the host, of moves to the device"] * 3
        with launches:
            return tally(self)

    late.LateFilter.draw = on_host  # type: ignore[method-assign]
    Counting._count = on_device  # type: ignore[method-assign]


def fold_into(x: torch.Tensor, spans: Any, sketch: torch.Tensor, square: torch.Tensor) -> None:
    folded, norm = fold._fold_on_cpu(x, spans, len(sketch))
    sketch += folded
    square += norm


def correct(total: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    assert abs(shares[0].item() - 1) < 1e-6
    return total


def count(device: torch.device, settings: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return of each step all launches, and those in each bucket's hook."""
    take_accelerators_way()
    launches = Launches()
    replace(launches)
    of_buckets: list[list[str]] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations other than its own
        before = len(launches.names)
        with launches:
            future = gaf_hook(state, bucket)
        of_buckets.append(launches.names[before:])
        return future

    model, state = ddp(Probe(SIZES), device, bucket_cap_mb=0.001), GAFState(**settings)
    model.register_comm_hook(state, hook)
    steps = []
    for step in range(6):
        launches.names, of_buckets = [], []
        model(agreeing_gradients(3, sum(SIZES), step)[dist.get_rank()]).backward()
        steps.append((launches.names, of_buckets))
    return steps


def test_launches_few_operations(gloo_ranks: Ranks) -> None:
    of_bucket = (
        7  # two folds, where they are added up, the scale, two all-reduces, and behind the hook what corrects the sum
    )
    for steps in gloo_ranks(3, count, {}):
        for names, of_buckets in steps[2:]:
            assert len(of_buckets) == len(SIZES)
            for each in of_buckets[1:-1]:
                assert len([name for name in each if name != "correct"]) == of_bucket - 1
            assert names.count("correct") == len(SIZES)
            assert len(names) <= of_bucket * len(SIZES) + 25, names


def test_ballots_of_several_steps_launch_less(gloo_ranks: Ranks) -> None:
    for steps in gloo_ranks(3, count, {"judge_every": 2}):
        assert all(len(names) <= 8 * len(SIZES) + 25 for names, _ in steps[2:])
        assert sum(len(names) for names, _ in steps[2:]) <= 8 * 4 * len(SIZES) + 2 * 25
