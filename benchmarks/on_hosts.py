"""Run a benchmark on several hosts, at a link speed of your choice, on this one machine.

    python -m benchmarks.on_hosts --hosts 4 --rate 1gbit benchmarks.step_time --interface eth0 --model resnet18
    python -m benchmarks.on_hosts --hosts 2 --ranks-per-host 4 benchmarks.step_time --interface eth0

The hosts are network namespaces on a bridge; each may send at the given rate (tc words), all its ranks together;
what these send each other is not slowed. Needs root and iproute2. They share this machine's cores: what is slow
about computing stays slow.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.command_line import described, positive
from tools.hosts import Hosts, why_no_hosts


def rate(text: str) -> str:
    """Return a rate in tc's words."""
    if re.fullmatch(r"\d+(\.\d+)?([kmgt]i?)?(bit|bps)", text.lower()) is None:
        raise argparse.ArgumentTypeError(f"must be a rate as in 200mbit or 1gbit, found {text!r}")
    return text


def wait(processes: Sequence[subprocess.Popen[str]]) -> int:
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
    parser.add_argument("--ranks-per-host", type=positive, default=1)
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
    """Start the ranks, wait for all, and pass on the first failure."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ranks and hosts go first
    link = f"one machine, {given.rate or 'unlimited'} per host"
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # hosts that share a GPU can form no NCCL group
        "GAF_DDP_LINK": link + f" of {given.ranks_per_host} ranks" * (given.ranks_per_host > 1),  # for the results
    }
    with Hosts(given.hosts, given.rate) as hosts:
        code = wait(hosts.start([sys.executable, "-m", given.module, *given.arguments], given.ranks_per_host))
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
