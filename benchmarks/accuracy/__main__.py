"""python -m benchmarks.accuracy: train experiments and their controls, then write tables and pictures.

    python -m benchmarks.accuracy --list
    python -m benchmarks.accuracy --experiments shift                  # a group
    python -m benchmarks.accuracy --experiments "shift w4 bad 0"       # one experiment
    python -m benchmarks.accuracy --experiments human --data-dir DIR   # needs images: see images.py for the layout
    python -m benchmarks.accuracy --experiments paper --device cuda --data-dir DIR   # not run on the CPU

Finished runs are in OUT/accuracy_runs.jsonl, and a second start goes on where the first stopped.
`--device cuda` is untested: ranks take the GPUs in turn, several per GPU where there are fewer, over gloo.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.accuracy import report
from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.experiments import EXPERIMENTS, GROUPS, quick
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.work import all_runs, make, processors

USUAL = tuple(group for group in GROUPS if group != "paper")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{e.group:<11} {e.name}" for e in EXPERIMENTS.values()))
        return
    try:
        chosen = _chosen(given.experiments)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    for group, wanted in chosen.items():
        shown = [_adapted(e, given) for e in EXPERIMENTS.values() if e.group == group]
        experiments = [e for e in shown if e.name in {other.name for other in wanted}]
        store = Store(given.out / "accuracy_runs.jsonl")
        runs = all_runs(_with_data(experiments, given))
        if given.ranks == "one-process":
            runs = [run for run in runs if run.engine == "one process"]
        if not given.tables_only:
            print(f"{group}: {GROUPS[group]}")
            make(runs, store, given.data_dir, given.jobs, given.device)
        command = f"python -m benchmarks.accuracy --experiments {group}" + " --quick" * given.quick
        report.write(group, GROUPS[group], shown, store, given.out, command)


def _with_data(experiments: Sequence[Experiment], given: argparse.Namespace) -> list[Experiment]:
    """The experiments whose data is at hand; the others are named on the screen."""
    at_hand = [e for e in experiments if e.base.data == "digits" or given.data_dir is not None]
    for e in experiments:
        if e not in at_hand and not given.tables_only:
            print(f"left out, needs --data-dir: {e.name}")
    return at_hand


def _adapted(experiment: Experiment, given: argparse.Namespace) -> Experiment:
    """The experiment as the command line wants it."""
    if given.ranks == "ddp":
        experiment = replace(experiment, base=replace(experiment.base, engine="ddp"), real_arms=())
    return quick(experiment) if given.quick else experiment


def _chosen(names: Sequence[str]) -> dict[str, list[Experiment]]:
    """The experiments called by their own names or their groups', by group, in the table's order."""
    known = {*GROUPS, *EXPERIMENTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--experiments must be groups or names from --list, found {unknown}")
    chosen: dict[str, list[Experiment]] = {}
    for e in EXPERIMENTS.values():
        if e.name in names or e.group in names:
            chosen.setdefault(e.group, []).append(e)
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--experiments", nargs="+", default=list(USUAL), metavar="NAME", help="groups or experiments; default: "
        + " ".join(USUAL))  # fmt: skip
    add("--list", action="store_true", help="print the experiments' names and stop")
    add("--quick", action="store_true", help="twenty steps of one seed: does it run?")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results", help="default: benchmarks/results")
    add("--data-dir", type=Path, help="folder of the images that do not come with a package")
    add("--jobs", type=int, default=processors(), help="runs at a time, in one process each; default: all cores")
    add(
        "--ranks",
        choices=("declared", "one-process", "ddp"),
        default="declared",
        help="declared: all in one process"
        " and some again on real ranks; ddp: all on real ranks\n(ten times slower on few cores, the same numbers)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the real ranks; cuda is untested")
    add("--tables-only", action="store_true", help="make no runs, write what there is")
    return parser


if __name__ == "__main__":
    main()
