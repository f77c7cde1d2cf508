"""Run a benchmark with every rank on a host of its own, at a link speed of your choice, on this one machine.

    python -m benchmarks.on_hosts --hosts 4 --rate 1gbit benchmarks.step_time --interface eth0 --model resnet18

The hosts are network namespaces on a bridge; each may send at the given rate (tc words). Needs root and iproute2.
They share this machine's cores: what is slow about computing stays slow.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time

from benchmarks.command_line import described, positive
from tools.hosts import Hosts, why_no_hosts


def rate(text: str) -> str:
    """Return a rate in tc's words."""
    if re.fullmatch(r"\d+(\.\d+)?([kmgt]i?)?(bit|bps)", text.lower()) is None:
        raise argparse.ArgumentTypeError(f"must be a rate as in 200mbit or 1gbit, found {text!r}")
    return text


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all to end, or for the first to fail; none is left. Return the first failure's code, 0 without."""
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()  # no effect on one that has ended
            process.wait()
    ended = [process.returncode for process in processes]
    return next((code for code in ended if code > 0), next((code for code in ended if code), 0))


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = described(__doc__)
    parser.add_argument("--hosts", type=positive, default=4)
    parser.add_argument("--rate", type=rate, help="what each host may send; unlimited if not given")
    parser.add_argument("module", help="the benchmark, e.g. benchmarks.step_time")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what it is given")
    given = parser.parse_args()
    if given.hosts > 254:
        parser.error(f"--hosts must be at most 254, found {given.hosts}")
    if (problem := why_no_hosts()) is not None:
        parser.error(problem)
    return given


def main() -> None:
    """Start one rank per host, wait for all, and pass on the first failure."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ranks and hosts go first
    shared = {
        **os.environ,
        "WORLD_SIZE": str(given.hosts),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # hosts that share a GPU can form no NCCL group
        "GAF_DDP_LINK": f"one machine, {given.rate or 'unlimited'} per host",  # for the results' hardware
    }
    command = [sys.executable, "-m", given.module, *given.arguments]
    with Hosts(given.hosts, given.rate) as hosts:
        processes: list[subprocess.Popen[bytes]] = []
        for rank, name in enumerate(hosts.names):
            host = ["ip", "netns", "exec", name]
            processes.append(subprocess.Popen([*host, *command], env={**shared, "RANK": str(rank)}))
        code = wait(processes)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
