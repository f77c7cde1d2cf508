"""The helper that starts ranks fails when it should: other tests rely on it."""

import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, forkserver
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tools.ranks import RankError, _make_warnings_errors, _Rank

Ranks = Callable[..., list[Any]]


def double(device: torch.device, value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value + dist.get_rank()


def test_ranks_return_in_order(gloo_ranks: Ranks) -> None:
    assert [x.tolist() for x in gloo_ranks(3, double, torch.ones(2))] == [[3, 3], [4, 4], [5, 5]]


def raise_on_rank_1(device: torch.device) -> None:
    if dist.get_rank() == 1:
        raise LookupError("not today")


def test_what_one_rank_raises_fails_with_its_traceback(gloo_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="not today") as error:
        gloo_ranks(2, raise_on_rank_1)
    assert list(error.value.failures) == [1]
    assert "in raise_on_rank_1" in error.value.failures[1]


def die_on_rank_1(device: torch.device) -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def test_a_rank_that_dies_fails(gloo_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1: died with exit code 3"):
        gloo_ranks(2, die_on_rank_1)


def exit_with_code_7(device: torch.device) -> None:
    Finalize(None, os._exit, (7,), exitpriority=1)


def test_an_exit_code_other_than_0_fails(gloo_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank 0: returned, but its exit code 5 s later was 7"):
        gloo_ranks(1, exit_with_code_7)


def wait_forever(device: torch.device) -> None:
    threading.Event().wait()


def test_a_rank_that_hangs_fails(gloo_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank 0: did not finish in time"):
        gloo_ranks(1, wait_forever, timeout=2.0)


def warn(device: torch.device) -> None:
    warnings.warn("careful", stacklevel=1)


def test_a_warning_fails(gloo_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="UserWarning: careful"):
        gloo_ranks(1, warn)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_what_is_deprecated_fails_only_if_asked(category: type[Warning], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAF_DDP_STRICT_WARNINGS", raising=False)
    with warnings.catch_warnings(record=True):
        _make_warnings_errors()
        warnings.warn("careful", category, stacklevel=1)
        monkeypatch.setenv("GAF_DDP_STRICT_WARNINGS", "1")
        _make_warnings_errors()
        with pytest.raises(category, match="careful"):
            warnings.warn("careful", category, stacklevel=1)


@pytest.mark.ranks
def test_an_exit_code_survives_another_thread_that_starts_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting a process collects the exit codes of those that ended, and each can be read only once."""
    reads = threading.Event()

    def read_slowly(source: int) -> int:
        reads.set()
        time.sleep(0.5)
        return int(read(source))

    def start(store: str) -> _Rank:
        return _Rank(0, 1, tmp_path / store, "gloo", 60.0, pickle.dumps((double, (torch.ones(1),))))

    ended = start("first")
    ended.receive()
    connection.wait([ended._process.sentinel])
    read: Callable[[int], int] = vars(forkserver)["read_signed"]
    monkeypatch.setattr(forkserver, "read_signed", read_slowly)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(start, "second")
        assert reads.wait(5)
        ended.stop()
    other.result().receive()
    other.result().stop()
    assert (ended.failure, other.result().failure) == (None, None)
