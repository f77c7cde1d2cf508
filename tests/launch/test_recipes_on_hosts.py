"""DiLoCo's recipes on four hosts, at the link speed it is made for: network namespaces of 200 Mbit/s."""

import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch.test_recipes import FOLDER, RECIPES, assert_left_out
from tools.hosts import Hosts, why_no_hosts

# A host's name is its address: torchft's workers find each other by names, and here all hosts have this machine's.
START = r"""
hostname "10.0.0.$((RANK + 1))" && exec "$0" -m torch.distributed.run --nnodes "$WORLD_SIZE" --node-rank "$RANK" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node 1 "$@" --turned 1
"""


@pytest.mark.parametrize("name", ["diloco.py", "diloco_torchft.py"])
@pytest.mark.job
def test_a_turned_worker_is_left_out_at_200_mbit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, ranks = RECIPES[name]
    if find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    missing = [each for each in ("unshare", "hostname") if shutil.which(each) is None]
    problem = why_no_hosts() or (f"needs {missing[0]}" if missing else None)
    if problem is not None:
        pytest.skip(problem)
    for variable, value in (("OMP_NUM_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(variable, value)
    command = ["unshare", "--uts", "sh", "-c", START, sys.executable, str(FOLDER / name)]
    file = tmp_path / "printed"
    with Hosts(ranks, "200mbit") as hosts, file.open("w") as output:
        workers = hosts.start(command, output=output.fileno())
        try:
            deadline = time.monotonic() + 150
            codes = [worker.wait(deadline - time.monotonic()) for worker in workers]
        finally:
            for worker in workers:
                worker.terminate()  # torchrun ends its workers then; no effect on one that has ended
            for worker in workers:
                worker.wait(40)
    printed = file.read_text()
    assert codes == [0] * ranks, printed[-3000:]
    assert_left_out("".join(line for line in printed.splitlines() if "kept {" in line))
