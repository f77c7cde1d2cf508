"""The job files, started as on the machines they are for: one node, two nodes on a network, and under Slurm."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.launch.jobs import REPOSITORY, assert_same_job
from tests.launch.stand_ins import LAUNCH, Tools, output_of, stand_ins

JOB = ["--seeds", "1", "--steps", "20", "--method", "gaf", "--corrupt-ranks", "1"]
TIMEOUT = 120.0  # seconds for a job of about ten


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Return the stand-ins of one test."""
    return stand_ins(tmp_path)


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


@pytest.fixture(scope="module")
def single_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where one node with four ranks left its results, for every other way of starting to reproduce."""
    folder = tmp_path_factory.mktemp("single_node")
    command = [LAUNCH / "single_node.sh", *JOB, "--out", folder / "out"]
    log = folder / "log"
    _finish((_start(command, stand_ins(folder).environment(), log), log))
    return folder


@pytest.mark.job
def test_single_node(single_node: Path) -> None:
    shown = (single_node / "log").read_text()
    assert "4 ranks on cpu" in shown
    assert (single_node / "out" / "table.txt").read_text() in shown
    assert (single_node / "out" / "agreement.png").exists()


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, "--nproc-per-node 2 --max-restarts 0"),
        ({"GPUS": "1", "RESTARTS": "3"}, "--nproc-per-node 1 --max-restarts 3"),
    ],
    ids=["all GPUs", "fewer"],
)
def test_single_node_starts_a_rank_per_gpu(tools: Tools, given: dict[str, str], options: str) -> None:
    tools.add("nvidia-smi", 'echo "GPU 0: H100 (UUID: a)"; echo "GPU 1: H100 (UUID: b)"')
    tools.add("torchrun", 'echo "$PWD $*"')
    printed = output_of([LAUNCH / "single_node.sh", "--tau", "1"], tools.environment(**given))
    assert printed == f"{REPOSITORY} --standalone {options} -m launch.train --tau 1\n"


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
    assert_same_job(out, single_node / "out")


@pytest.mark.parametrize("missing", ["NODES", "RDZV_HOST"])
def test_multi_node_says_what_to_set(tools: Tools, missing: str) -> None:
    given = {name: value for name, value in {"NODES": "2", "RDZV_HOST": "localhost"}.items() if name != missing}
    ended = subprocess.run(
        [LAUNCH / "multi_node.sh"], env=tools.environment(**given), capture_output=True, text=True, timeout=30
    )
    assert ended.returncode != 0
    assert f"{missing}: set it to" in ended.stderr


@pytest.mark.parametrize(("nodes", "restarts"), [("2", 0), ("1:4", 3)], ids=["fixed", "elastic"])
def test_multi_node_on_one_machine_leaves_addresses_to_torchrun(tools: Tools, nodes: str, restarts: int) -> None:
    """With a loopback address torchrun itself sees who hosts the rendezvous; telling it twice would fail."""
    tools.add("torchrun", 'echo "$*"')
    given = tools.environment(NODES=nodes, RDZV_HOST="127.0.0.1", RDZV_PORT="1234", GPUS="3", JOB="mine")
    assert output_of([LAUNCH / "multi_node.sh"], given) == (
        f"--nnodes {nodes} --nproc-per-node 3 --max-restarts {restarts} "
        "--rdzv-backend c10d --rdzv-id mine --rdzv-endpoint 127.0.0.1:1234 -m launch.train\n"
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
    assert_same_job(tmp_path / "runs" / number, single_node / "out")


def test_slurm_file_asks_for_one_task_per_node() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert lines[0].startswith("#!")
    assert "#SBATCH --ntasks-per-node=1" in lines


@pytest.mark.parametrize("name", ["single_node.sh", "multi_node.sh", "slurm.sbatch"])
def test_job_files_are_clean(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert "set -euo pipefail" in text
    machines_may_change = name == "multi_node.sh"
    assert ("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text) == machines_may_change
    assert subprocess.run(["bash", "-n", LAUNCH / name], timeout=30).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", LAUNCH / name], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout
