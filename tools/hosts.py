"""Hosts of our own: network namespaces on a common bridge, where what ranks send can be counted, or slowed.

Needs root and iproute2. Everything lives in namespaces: nothing is left in the machine's own network.
"""

import itertools
import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

_REPOSITORY = Path(__file__).parents[1]
_numbers = itertools.count()


def why_no_hosts() -> str | None:
    """Return why this machine cannot have hosts, None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2's ip"
    try:
        with Hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"


class Hosts:
    """`with Hosts(4) as hosts`: namespaces with one interface, `eth0`, each; removed at the end.

    Args:
        count: how many.
        rate: what each may send, in tc's words (`"200mbit"`); unlimited if None.
    """

    def __init__(self, count: int, rate: str | None = None) -> None:
        name = f"gaf-{os.getpid()}-{next(_numbers)}"
        self.switch = f"{name}-switch"
        self.names = [f"{name}-{i}" for i in range(count)]
        self._rate = rate

    def __enter__(self) -> "Hosts":
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def start(
        self, command: Sequence[str], ranks_per_host: int = 1, output: int | None = None
    ) -> list[subprocess.Popen[str]]:
        """Start a command for every rank, on its host, with torchrun's environment; a host's ranks are neighbours.

        output: what subprocess does with what they write; None is ours.
        """
        path = [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]
        world = {
            "PYTHONPATH": os.pathsep.join(path),
            "WORLD_SIZE": str(len(self.names) * ranks_per_host),
            "LOCAL_WORLD_SIZE": str(ranks_per_host),
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[rank // ranks_per_host], *command],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank % ranks_per_host)},
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                text=True,
            )
            for rank in range(int(world["WORLD_SIZE"]))
        ]

    def run(
        self,
        body: Callable[..., Any],
        *args: Any,
        folder: Path,
        ranks_per_host: int = 1,
        timeout: float = 120.0,
    ) -> list[Any]:
        """Call `body(*args)` on every rank, in a gloo group, and return what they returned, in order.

        Raises RuntimeError with every rank's output if any failed or the time-out (seconds) passed.
        """
        task = folder / f"task-{uuid.uuid4().hex}"
        task.write_bytes(pickle.dumps((body, args)))
        command = [sys.executable, "-m", "tools.hosts", str(task)]
        processes = self.start(command, ranks_per_host, subprocess.PIPE)
        deadline = time.monotonic() + timeout
        outputs = []
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=max(0.0, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                process.kill()
                outputs.append(process.communicate()[0] + "did not finish in time")
        if any(process.returncode != 0 for process in processes):
            raise RuntimeError("\n".join(f"rank {rank}: {output}" for rank, output in enumerate(outputs)))
        return [pickle.loads(_result(task, rank).read_bytes()) for rank in range(len(processes))]

    def _make(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip(*f"link add eth0 netns {name} type veth peer name port{i} netns {self.switch}".split())
            _ip("-n", self.switch, "link", "set", f"port{i}", "master", "br0", "up")
            _ip("-n", name, "address", "add", f"10.0.0.{i + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            if self._rate is not None:
                shape = f"qdisc add dev eth0 root tbf rate {self._rate} burst 256kb latency 200ms"
                _run("tc", "-n", name, *shape.split())

    def _remove(self) -> None:
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def bytes_sent(interface: str = "eth0") -> int:
    """Return what this process's host has sent through an interface so far, TCP/IP and Ethernet headers included.

    What ranks on one host send each other does not pass its `eth0`.

    Raises:
        ValueError: the host has no such interface.
    """
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"interface must be a network interface of this host, found {interface!r}")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _result(task: Path, rank: int) -> Path:
    return task.with_name(f"{task.name}-{rank}")


def _main(task: Path) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task}-store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    body, args = pickle.loads(task.read_bytes())
    value = body(*args)
    dist.barrier()
    dist.destroy_process_group()
    _result(task, rank).write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
