"""attach in Ray Train's workers: to the bit what a loop on DDP does, and a wrong worker is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed")

ROOT = Path(__file__).parent.parent.parent

# No token in the home folder, and no statistics sent; patience on a busy machine, and no waiting on an idle one.
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
PATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "150", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


@pytest.mark.job
def test_equals_the_loop_and_leaves_a_wrong_worker_out(tmp_path: Path) -> None:
    """In a process of its own, as Ray waits where pytest's time-out cannot end it; its workers end with it."""
    command = [sys.executable, "-m", "tests.frameworks.ray_job", str(tmp_path)]
    environment = {**os.environ, **QUIET, **PATIENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    kept = [summary[f"gaf/kept_rank_{rank:02}"] for rank in range(3)]
    assert kept[0] == kept[2] == 1
    assert kept[1] < 0.2
