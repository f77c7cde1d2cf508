"""What torchrun and the ranks it starts share: a store that outlives them, and the reason of a failure."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from launch.starts import store_of_this_start, tell_torchrun
from tests.launch.jobs import environment

WORLD = 3


def _store() -> Store:
    """Return a store as torchrun keeps it for all starts."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def _client(port: int) -> Store:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))  # type: ignore[attr-defined]


def _start(store: Store) -> list[Store]:
    """Return what each rank of one start gets; each has its own connection to the store."""
    with ThreadPoolExecutor(WORLD) as ranks:
        port = store.port  # type: ignore[attr-defined]
        begun = [ranks.submit(store_of_this_start, _client(port), rank, WORLD) for rank in range(WORLD)]
        return [each.result(timeout=30) for each in begun]


def test_ranks_of_one_start_share_and_find_nothing_of_the_starts_before() -> None:
    torchruns = _store()
    for start in range(3):
        first, *others = _start(torchruns)
        assert not any(each.check(["address"]) for each in (first, *others))
        first.set("address", str(start))
        assert [each.get("address") for each in others] == [str(start).encode()] * (WORLD - 1)


def test_a_rank_that_died_while_it_was_waiting_is_not_taken_for_its_successor() -> None:
    torchruns = _store()
    torchruns.set("token of rank 1", "of one that died")
    first, *others = _start(torchruns)
    first.set("address", "new")
    assert [each.get("address") for each in others] == [b"new"] * (WORLD - 1)


def test_a_rank_that_does_not_come_ends_the_wait() -> None:
    torchruns = _store()
    torchruns.set("token of rank 1", "of one that died")
    with pytest.raises(dist.DistStoreError, match="rank 1 must start in time, found nothing of it"):
        store_of_this_start(torchruns, 0, 2, wait=0.1)


def test_torchrun_is_told_the_reason_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_torchrun("no room\n")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == "no room"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder"))
    tell_torchrun("nowhere to write")


@pytest.mark.job
def test_the_last_words_of_torchrun_are_those_of_the_error(tmp_path: Path) -> None:
    job = ["--standalone", "--nproc-per-node", "2", "-m", "launch.train", "--tau", "3", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *job],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if line.strip("= ")][-1]
    assert last.split(": ", 1)[1] == "launch.train: error: --tau: must be a number in [0, 2], found '3'"
