"""Run a benchmark with every rank on a host of its own, at a link speed of your choice, on this one machine.

    python -m benchmarks.on_hosts --hosts 4 --rate 1gbit benchmarks.step_time --interface eth0 --model resnet18

The hosts are network namespaces on a bridge; each may send at the given rate (tc words). Needs root and iproute2.
They share this machine's cores: what is slow about computing stays slow.
"""

import argparse
import os
import subprocess
import sys

from tests.hosts import Hosts


def main() -> None:
    """Start one rank per host, wait for all, and pass on the first failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", help="what each host may send, e.g. 200mbit, 1gbit; unlimited if not given")
    parser.add_argument("module", help="the benchmark, e.g. benchmarks.step_time")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what it is given")
    given = parser.parse_args()
    shared = {
        **os.environ,
        "WORLD_SIZE": str(given.hosts),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "GAF_DDP_LINK": f"one machine, {given.rate or 'unlimited'} per host",  # for the results' hardware
    }
    command = [sys.executable, "-m", given.module, *given.arguments]
    with Hosts(given.hosts, given.rate) as hosts:
        processes = [
            subprocess.Popen(["ip", "netns", "exec", name, *command], env={**shared, "RANK": str(rank)})
            for rank, name in enumerate(hosts.names)
        ]
        codes = [process.wait() for process in processes]
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()
