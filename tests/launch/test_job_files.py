"""The job files, started as on the machines they are for: one node, two nodes on a network, and under Slurm."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.launch.jobs import REPOSITORY, environment

LAUNCH = REPOSITORY / "launch"
JOB = ["--seeds", "1", "--steps", "20", "--method", "gaf", "--corrupt-ranks", "1"]
TIMEOUT = 120.0  # seconds for a job of about ten


@dataclass(frozen=True)
class Tools:
    """A folder of stand-in programs that comes first in the path."""

    folder: Path

    def add(self, name: str, *lines: str) -> None:
        """Make an executable bash script."""
        path = self.folder / name
        path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
        path.chmod(0o755)

    def environment(self, **values: str) -> dict[str, str]:
        """Return an environment with these tools, the repository, and the values given."""
        return environment(**{"PATH": f"{self.folder}:{os.environ['PATH']}", **values})


def _tools(folder: Path) -> Tools:
    """Return stand-ins for no GPUs, and for the torchrun of the interpreter that runs the tests."""
    tools = Tools(folder / "tools")
    tools.folder.mkdir()
    tools.add("torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    tools.add("nvidia-smi", "exit 9")
    return tools


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Return the stand-ins of one test."""
    return _tools(tmp_path)


def _start(command: Sequence[object], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=file, stderr=file, start_new_session=True
        )


def _finish(*started: tuple[subprocess.Popen[bytes], Path]) -> list[str]:
    """Wait for processes to end well; whatever happens, none of them or their children is left."""
    try:
        codes = [process.wait(TIMEOUT) for process, _ in started]
    finally:
        for process, _ in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    logs = [log.read_text() for _, log in started]
    assert codes == [0] * len(codes), "\n".join(logs)
    return logs


def _shown(command: Sequence[object], environment: dict[str, str]) -> str:
    """Return what a command prints that ends at once."""
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments, env=environment, check=True, capture_output=True, text=True, timeout=30
    ).stdout


@pytest.fixture(scope="module")
def single_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where one node with four ranks left its results, for every other way of starting to reproduce."""
    folder = tmp_path_factory.mktemp("single_node")
    command = [LAUNCH / "single_node.sh", *JOB, "--out", folder / "out"]
    log = folder / "log"
    _finish((_start(command, _tools(folder).environment(), log), log))
    return folder


def _assert_same_results(folder: Path, expected: Path) -> None:
    assert (folder / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    here, there = (
        torch.load(f / "checkpoint.pt", weights_only=True)["trainer"]["model"] for f in (folder, expected)
    )
    assert here.keys() == there.keys()
    for name in here:
        assert torch.equal(here[name], there[name]), name


@pytest.mark.job
def test_single_node(single_node: Path) -> None:
    shown = (single_node / "log").read_text()
    assert "4 ranks on cpu" in shown
    assert (single_node / "out" / "table.txt").read_text() in shown
    assert (single_node / "out" / "agreement.png").exists()


@pytest.mark.parametrize(("gpus", "ranks"), [("", "2"), ("1", "1")], ids=["all GPUs", "fewer"])
def test_single_node_starts_a_rank_per_gpu(tools: Tools, gpus: str, ranks: str) -> None:
    tools.add("nvidia-smi", 'echo "GPU 0: H100 (UUID: a)"; echo "GPU 1: H100 (UUID: b)"')
    tools.add("torchrun", 'echo "$PWD $*"')
    shown = _shown(
        [LAUNCH / "single_node.sh", "--tau", "1"], tools.environment(**({"GPUS": gpus} if gpus else {}))
    )
    assert shown == f"{REPOSITORY} --standalone --nproc-per-node {ranks} -m launch.train --tau 1\n"


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Yield two network namespaces joined by a cable, with addresses 10.77.0.1 and .2; gone after the test."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = (f"gaf{os.getpid()}a", f"gaf{os.getpid()}b")
    try:
        for name in names:
            if (made := _ip("netns", "add", name)).returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        _connect(*names)
        yield names
    finally:
        for name in names:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)


def _connect(one: str, other: str) -> None:
    commands = [["link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other]]
    for number, name in enumerate((one, other), 1):
        commands.append(["-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable"])
        commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", "cable")]
    for command in commands:
        done = _ip(*command)
        assert done.returncode == 0, done.stderr


@pytest.mark.job
def test_two_nodes_train_to_the_same_bits_as_one(
    tools: Tools, tmp_path: Path, two_nodes: tuple[str, str], single_node: Path
) -> None:
    out = tmp_path / "out"
    environment = tools.environment(NODES="2", RDZV_HOST="10.77.0.1", GPUS="2", GLOO_SOCKET_IFNAME="cable")
    command = [LAUNCH / "multi_node.sh", *JOB, "--out", out]
    logs = [tmp_path / f"{name}.log" for name in two_nodes]
    agents = [
        _start(["ip", "netns", "exec", name, *command], environment, log)
        for name, log in zip(two_nodes, logs, strict=True)
    ]
    shown = "".join(_finish(*zip(agents, logs, strict=True)))
    assert shown.count("4 ranks on cpu") == 1
    _assert_same_results(out, single_node / "out")


@pytest.mark.parametrize("missing", ["NODES", "RDZV_HOST"])
def test_multi_node_says_what_to_set(tools: Tools, missing: str) -> None:
    given = {name: value for name, value in {"NODES": "2", "RDZV_HOST": "localhost"}.items() if name != missing}
    ended = subprocess.run(
        [LAUNCH / "multi_node.sh"], env=tools.environment(**given), capture_output=True, text=True, timeout=30
    )
    assert ended.returncode != 0
    assert f"{missing}: set it to" in ended.stderr


def test_multi_node_on_one_machine_leaves_addresses_to_torchrun(tools: Tools) -> None:
    """With a loopback address torchrun itself sees who hosts the rendezvous; telling it twice would fail."""
    tools.add("torchrun", 'echo "$*"')
    environment = tools.environment(NODES="2", RDZV_HOST="127.0.0.1", RDZV_PORT="1234", GPUS="3", JOB="mine")
    assert _shown([LAUNCH / "multi_node.sh"], environment) == (
        "--nnodes 2 --nproc-per-node 3 --rdzv-backend c10d --rdzv-id mine --rdzv-endpoint 127.0.0.1:1234 "
        "-m launch.train\n"
    )


def _job_with_a_free_port() -> str:
    """Return a Slurm job number whose port, by the job file's rule, nobody listens on."""
    while True:
        number = random.SystemRandom().randrange(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 10_000 + number))
            return str(number)


@pytest.mark.job
def test_slurm(tools: Tools, tmp_path: Path, single_node: Path) -> None:
    """With stand-ins for Slurm's programs: srun starts its command once on each of two nodes, here both local."""
    tools.add("scontrol", '[[ "$*" == "show hostnames node[1-2]" ]] && printf "localhost\\nlocalhost\\n"')
    tools.add(
        "srun",
        'for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & nodes+=($!); done',
        'for node in "${nodes[@]}"; do wait "$node" || exit; done',
    )
    number, log = _job_with_a_free_port(), tmp_path / "log"
    slurm = {
        "JOB_ID": number,
        "JOB_NODELIST": "node[1-2]",
        "NNODES": "2",
        "GPUS_ON_NODE": "2",
        "CPUS_PER_TASK": "2",
    }
    slurm["SUBMIT_DIR"] = str(tmp_path)
    environment = tools.environment(**{f"SLURM_{name}": value for name, value in slurm.items()})
    spooled = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # sbatch runs a copy elsewhere
    (shown,) = _finish((_start(["bash", spooled, *JOB], environment, log), log))
    assert shown.count("4 ranks on cpu") == 1
    _assert_same_results(tmp_path / "runs" / number, single_node / "out")


def test_slurm_file_asks_for_one_task_per_node() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert lines[0].startswith("#!")
    assert "#SBATCH --ntasks-per-node=1" in lines


@pytest.mark.parametrize("name", ["single_node.sh", "multi_node.sh", "slurm.sbatch"])
def test_job_files_are_clean(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert "set -euo pipefail" in text
    assert subprocess.run(["bash", "-n", LAUNCH / name], timeout=30).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", LAUNCH / name], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout
