"""What only a GPU can tell, in one run of some minutes: a page with a table for each stage.

    python -m benchmarks.on_gpu --out benchmarks/results/on_gpu.md

Stages: the tests that run on a GPU, kernels against the floor of their bytes, launches and host time, a step in a CUDA
graph, step times beside plain DDP, and the paper's set-up on CIFAR-100 in what time is left, if --data-dir holds it as
benchmarks/accuracy/cifar.py says. Each has its share of the time and processes of its own. One that fails is written
into the page, and the others go on; the exit code is 1 then, and 2 without a GPU. What the processes printed is in a
.log file beside the page. --rehearse tries on a CPU what a CPU can do, at sizes that say nothing.
"""

import argparse
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.command_line import described, new_file, positive
from benchmarks.measure import hardware
from benchmarks.on_gpu.drive import run_all
from benchmarks.on_gpu.job import Job
from benchmarks.on_gpu.page import commit, libraries
from benchmarks.on_gpu.rows import Rows
from benchmarks.on_gpu.stages import STAGES, stage_named


def arguments() -> argparse.Namespace:
    """Return the command line."""
    names = [stage.name for stage in STAGES]
    parser = described(__doc__)
    parser.add_argument("--out", type=new_file, help="the page")
    parser.add_argument("--minutes", type=positive, default=8, help="for all stages together; default 8")
    parser.add_argument("--data-dir", type=Path, help="with the folder cifar100; without it the last stage is left out")
    parser.add_argument("--micro-batches", type=positive, nargs="+", default=[2], help="of a step in the last stage")
    parser.add_argument("--stages", choices=names, nargs="+", help="a selection; default all")
    parser.add_argument("--commit", help="for the page, where there is no git to say it")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--stage", choices=names, help="do one stage's part in this process, as a rank of it")
    parser.add_argument("--part", help="which; default the first")
    parser.add_argument("--json", type=new_file, help="where a part's rows go")
    parser.add_argument("--until", type=float, help="when the part is ended, in seconds since 1970")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch finds none here; --rehearse tries what a CPU can do")
    if min(given.micro_batches) < 2:
        parser.error(
            f"--micro-batches must be 2 or more, as one has nothing to agree with, found {given.micro_batches}"
        )
    if (given.out is None) == (given.stage is None):
        parser.error("give either --out, for the whole run, or --stage, for one stage in this process")
    if given.data_dir is not None:
        given.data_dir = given.data_dir.absolute()
        table = given.data_dir / "cifar100" / "human_labels.csv"
        if not table.is_file():
            parser.error(f"--data-dir must hold cifar100 as benchmarks/accuracy/cifar.py says, lacks {table}")
    return given


def work(given: argparse.Namespace) -> None:
    """Do one part of a stage, as one of its ranks, and end the process."""
    stage = stage_named(given.stage)
    writes = os.environ.get("RANK", "0") == "0"
    rows = Rows(given.json if writes else None)
    until = given.until or time.time() + 600
    part = given.part or next(iter(stage.parts))
    rows.write()
    _end_by(until)
    if given.rehearse:
        torch.set_num_threads(1)  # ranks share few cores
    stage.run(Job(part, given.rehearse, until, rows, given.data_dir, tuple(given.micro_batches)))
    if given.json is None:
        print(rows.rows, rows.notes, rows.errors, sep="\n")
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # a rank that leaves while others still talk to it can take them along
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written: an end of a group or a device that hangs takes nobody's time


def _end_by(until: float) -> None:
    """Say where each thread is shortly before this process is ended, and end it if nobody does."""
    seconds = until - time.time()
    faulthandler.dump_traceback_later(max(seconds - 1.5, 0.5), exit=False)
    signal.alarm(max(int(seconds), 0) + 20)


def main() -> None:
    """Run all stages, or one part of one."""
    given = arguments()
    if given.stage is not None:
        work(given)
    device = torch.device("cpu" if given.rehearse else "cuda")
    named = ("date", "device", "cores", "torch", "python")
    facts = {name: value for name, value in hardware(device).items() if name in named}
    facts |= libraries()
    facts["commit"] = given.commit or commit()
    facts["minutes"] = given.minutes
    if given.rehearse:
        facts["rehearsal"] = "on a CPU, at tiny sizes: the numbers say nothing"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    given.log = given.out.with_suffix(".log")
    sys.exit(0 if run_all(given, facts) else 1)


if __name__ == "__main__":
    main()
