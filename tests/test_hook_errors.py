"""An error in a weighting or a schedule: the exception on the rank, the end of the others, never a hang."""

import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp import GAFState, gaf_hook
from tests.nets import Probe, ddp
from tools.ranks import RankError, run_ranks

Ranks = Callable[..., list[Any]]

W = 2
GROUP_TIMEOUT = 5.0  # seconds, of the group that trains; the default group has more, to be made on busy machines


class Failure(NamedTuple):
    """What fails (see `_answer`), on rank 1 or on all ranks, at which step."""

    how: str
    on_all: bool = True
    scope: str = "bucket"
    step: int = 0
    static_graph: bool = False


class End(NamedTuple):
    """How one backward ended."""

    traceback: str
    kind: str
    seconds: float


class Report(NamedTuple):
    """What one rank saw: in the step with the failure, in the next, and with a new model but the same state."""

    failed: End
    again: End
    anew: End


SCOPES = ("bucket", "model")
FAILURES = [
    *(Failure("raises", on_all, scope, step) for on_all in (True, False) for scope in SCOPES for step in (0, 2)),
    *(Failure("raises", scope=scope, step=step, static_graph=True) for scope in SCOPES for step in (0, 2)),
    Failure("raises", on_all=False, step=2, static_graph=True),
    *(Failure(how, scope=scope, step=1) for how in ("shape", "dtype", "schedule") for scope in SCOPES),
    *(Failure(how, on_all=False) for how in ("shape", "dtype", "schedule")),
    *(
        Failure(how, scope=scope, step=1)
        for how, scope in zip(("nan", "inf", "-0.5"), (*SCOPES, "bucket"), strict=True)
    ),
]

EXPECTED = {
    "raises": ("LookupError", "LookupError: no weights today"),
    "shape": (
        "ValueError",
        "must return finite weights >= 0, floating point of shape (2,), found (3,) of torch.float32",
    ),
    "dtype": (
        "ValueError",
        "must return finite weights >= 0, floating point of shape (2,), found (2,) of torch.int64",
    ),
    "nan": ("ValueError", "must return finite weights >= 0, floating point of shape (2,), found [nan, nan] from"),
    "inf": ("ValueError", "must return finite weights >= 0, floating point of shape (2,), found [inf, inf] from"),
    "-0.5": (
        "ValueError",
        "must return finite weights >= 0, floating point of shape (2,), found [-0.5, -0.5] from",
    ),
    "schedule": ("ValueError", "tau must be a cosine distance in [0, 2], found 3.0"),
}


def _answer(how: str) -> Tensor:
    if how == "shape":
        return torch.ones(3)
    if how == "dtype":
        return torch.ones(2, dtype=torch.int64)
    if how in ("nan", "inf", "-0.5"):
        return torch.full((2,), float(how))
    raise LookupError("no weights today")


def make_state(failure: Failure, group: Any) -> GAFState:
    """Return a state whose weighting, or schedule, fails as asked."""

    def now() -> bool:
        return state.step >= failure.step and (failure.on_all or dist.get_rank() == 1)

    def a_weighting_that_fails(gramian: Tensor) -> Tensor:
        return _answer(failure.how) if now() else torch.full((len(gramian),), 0.5)

    def a_schedule_that_fails(step: int) -> float:
        return 3.0 if now() else 1.0

    if failure.how == "schedule":
        state = GAFState(group, tau=a_schedule_that_fails, scope=failure.scope)  # type: ignore[arg-type]
    else:
        state = GAFState(group, weighting=a_weighting_that_fails, scope=failure.scope)  # type: ignore[arg-type]
    return state


def backward(model: nn.Module, device: torch.device) -> End:
    start = time.monotonic()
    try:
        model(torch.ones(150, device=device)).backward()
    except Exception as error:
        return End(traceback.format_exc(), type(error).__name__, time.monotonic() - start)
    return End("", "nothing", time.monotonic() - start)


def fail(device: torch.device, failure: Failure, folder: Path) -> Report:
    """Train until backward raises, and try to go on."""
    store = dist.FileStore(str(folder / "ended"), W)  # type: ignore[attr-defined]
    group = dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT))
    state = make_state(failure, group)
    options = {"static_graph": failure.static_graph, "bucket_cap_mb": 0.0001, "process_group": group}

    def make_model() -> nn.Module:
        model = ddp(Probe([50, 50, 50]), device, **options)
        model.register_comm_hook(state, gaf_hook)
        return model

    model = make_model()
    assert [backward(model, device).kind for _ in range(failure.step)] == ["nothing"] * failure.step
    failed = backward(model, device)
    unmet = failure.how == "schedule" and not failure.on_all  # fails before ranks have met
    again = failed if unmet else backward(model, device)
    # Go on together: a closed connection would end the other rank before the group's time-out does.
    store.set(str(dist.get_rank()), "ended")
    store.wait([str(rank) for rank in range(W)], timedelta(seconds=6 * GROUP_TIMEOUT))
    if not failure.on_all:
        return Report(failed, again, again)  # a group in which ranks missed each other makes no other model
    return Report(failed, again, backward(make_model(), device))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Failure, Future[list[Report]]]]:
    """Run the failures a few at a time: they mostly wait for time-outs."""
    with ThreadPoolExecutor(4) as pool:

        def start(failure: Failure) -> Future[Any]:
            folder = tmp_path_factory.mktemp("failure")
            return pool.submit(run_ranks, W, fail, failure, folder, folder=folder)

        yield {failure: start(failure) for failure in FAILURES}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: "-".join(map(str, f)))
@pytest.mark.ranks
def test_errors_end_every_rank(reports: dict[Failure, Future[list[Report]]], failure: Failure) -> None:
    limit = GROUP_TIMEOUT if failure.step else 3 * GROUP_TIMEOUT  # ranks meet first
    for rank, report in enumerate(reports[failure].result()):
        if failure.on_all or rank == 1:
            kind, message = EXPECTED[failure.how]
            assert report.failed.kind == kind
            assert message in report.failed.traceback
            if failure.how != "schedule":  # by its traceback, or in the message
                assert "a_weighting_that_fails" in report.failed.traceback
            assert report.failed.seconds < limit
        else:
            message = "Timed out"
            assert report.failed.kind == "RuntimeError"
            assert message in report.failed.traceback
            assert re.search(r"gaf_ddp: (step \d, bucket \d|before the first bucket)", report.failed.traceback)
            assert GROUP_TIMEOUT / 2 < report.failed.seconds < GROUP_TIMEOUT + limit
        if failure.how == "schedule" and not failure.on_all:
            continue
        # DDP itself refuses another forward, at once, if not in the clearest words; a new model wants a new state.
        assert report.again.kind == "RuntimeError"
        assert report.again.seconds < GROUP_TIMEOUT
        if failure.on_all:
            assert report.anew.kind == "ValueError"
            assert "state must be of this model: make a GAFState for each model" in report.anew.traceback
            assert report.anew.seconds < GROUP_TIMEOUT


def survive(device: torch.device, scope: str) -> None:
    """Train until rank 1 dies, then until that is noticed."""
    model = ddp(Probe([50, 50, 50]), device, bucket_cap_mb=0.0001)
    model.register_comm_hook(GAFState(tau=1.0, scope=scope), gaf_hook)  # type: ignore[arg-type]
    assert [backward(model, device).kind for _ in range(2)] == ["nothing"] * 2
    if dist.get_rank() == 1:
        os._exit(3)
    end = backward(model, device)
    assert end.kind == "RuntimeError"
    assert re.search(r"gaf_ddp: step 2, bucket \d: ", end.traceback)
    assert end.seconds < 30  # of the group's 60


@pytest.mark.parametrize("scope", SCOPES)
def test_a_rank_that_dies_ends_the_others(gloo_ranks: Ranks, scope: str) -> None:
    with pytest.raises(RankError) as error:
        gloo_ranks(W, survive, scope)
    assert error.value.failures == {1: "died with exit code 3"}


def train_sparse(device: torch.device, scope: str) -> str:
    """Return what a sparse gradient is told."""
    module = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    model = ddp(module, device)
    model.register_comm_hook(GAFState(tau=1.0, scope=scope), gaf_hook)  # type: ignore[arg-type]
    try:
        model(torch.tensor([1, 2], device=device)).sum().backward()
    except TypeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("scope", SCOPES)
def test_sparse_gradients_are_refused(ranks: Ranks, scope: str) -> None:
    for message in ranks(2, train_sparse, scope):
        assert message == "gradients must be dense, found a sparse one, as nn.Embedding(sparse=True) makes"
