"""FilteredGroup in torchft's Manager: four replicas, one of them turned; another one is killed, and comes back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.by_hand import QUIET

pytest.importorskip("torchft", reason="torchft is not installed")

REPOSITORY = Path(__file__).parents[2]
TURNED, KILLED, STEPS = 1, 2, 60
pytestmark = [pytest.mark.job, pytest.mark.timeout(400), *(pytest.mark.filterwarnings(line) for line in QUIET)]


class Replicas:
    """Processes of `tests.frameworks.replicas`, and what they wrote."""

    def __init__(self, folder: Path, lighthouse: str) -> None:
        self._folder, self._lighthouse = folder, lighthouse
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self, way: str, replica: int, name: str, dies: int | None = None) -> None:
        """Start a replica, whose lines are under a name of their own; it may die by itself at a step."""
        command = [sys.executable, "-m", "tests.frameworks.replicas", way, str(replica), self._lighthouse]
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RUST_LOG": "warn"}
        with (self._folder / f"{name}.err").open("w") as errors:
            self._running[name] = subprocess.Popen(
                [*command, str(self._folder / name), *([] if dies is None else [str(dies)])],
                cwd=REPOSITORY,
                env=environment,
                stdout=errors,
                stderr=errors,
                text=True,
            )

    def kill(self, name: str) -> None:
        """End a replica without a word."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def wait_for_end(self, name: str) -> None:
        """Wait for a replica that dies by itself."""
        self._running.pop(name).wait(120)

    def kill_all(self) -> None:
        for name in list(self._running):
            self.kill(name)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return a replica's steps, in order."""
        file = self._folder / name
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self, name: str, replicas: int) -> list[dict[str, Any]]:
        """Return the committed ones of its latest steps in row, in which there were so many replicas."""
        found = [line for line in self.lines(name) if line["committed"]]
        others = [number for number, line in enumerate(found) if line["replicas"] != replicas]
        return found[others[-1] + 1 if others else 0 :]

    def wait(self, name: str, replicas: int, seconds: float = 120.0) -> list[dict[str, Any]]:
        """Return STEPS steps of it, or more, with so many replicas, once they are done."""
        deadline = time.monotonic() + seconds
        while len(found := self.steps(name, replicas)) <= STEPS:
            ended = [each for each, process in self._running.items() if process.poll() is not None]
            late = time.monotonic() > deadline
            if ended or late:
                texts = [f"{each}: {(self._folder / f'{each}.err').read_text()[-2000:]}" for each in self._running]
                last = {each: self.lines(each)[-3:] for each in self._running}
                raise AssertionError(f"{ended} ended, late: {late}, {last}, {texts}")
            time.sleep(0.1)
        return found


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=3, join_timeout_ms=3000, heartbeat_timeout_ms=2000)
    found = Replicas(tmp_path, lighthouse.address())
    try:
        yield found
    finally:
        found.kill_all()
        lighthouse.shutdown()


def assert_left_out(steps: list[dict[str, Any]], turned: int = TURNED) -> None:
    """Assert that in STEPS steps the turned one is left out at last, and the others are nearly always in."""
    votes = [line["kept"] for line in steps[:STEPS] if line["kept"] is not None]
    assert sum(kept[turned] for kept in votes[-20:]) <= 2, votes
    honest = [value for kept in votes for rank, value in enumerate(kept) if rank != turned]
    assert sum(honest) / len(honest) >= 0.9, votes


@pytest.mark.parametrize("way", ["ddp", "diloco"])
def test_a_replica_dies_and_comes_back(way: str, replicas: Replicas) -> None:
    for replica in range(4):
        replicas.start(way, replica, str(replica))
    assert_left_out(replicas.wait("0", 4))
    replicas.kill(str(KILLED))
    assert_left_out(replicas.wait("0", 3))
    replicas.start(way, KILLED, "back")
    back = replicas.wait("back", 4)
    assert_left_out(back)
    assert back[0]["step"] > 2 * STEPS
    for name in ("0", "1", "3"):
        others = {line["step"]: line["sum"] for line in replicas.lines(name) if line["committed"]}
        same = [line["sum"] == others[line["step"]] for line in back if line["step"] in others]
        assert len(same) >= STEPS - 5, name
        assert all(same), name


def test_a_ballot_that_is_owed_fails_a_step_alone(replicas: Replicas) -> None:
    for replica in range(4):
        replicas.start("ddp", replica, str(replica), 2 * STEPS if replica == KILLED else None)
    assert_left_out(replicas.wait("0", 4))
    replicas.wait_for_end(str(KILLED))
    assert_left_out(replicas.wait("0", 3))
    for name in ("0", "1", "3"):
        failed = [line for line in replicas.lines(name) if line["step"] == 2 * STEPS and not line["committed"]]
        assert 1 <= len(failed) <= 3, (name, failed)
        assert failed[0]["error"].startswith("gaf_ddp: step"), (name, failed)
