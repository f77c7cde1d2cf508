"""Train experiments and their controls, then write tables and pictures.

    python -m benchmarks.accuracy --list
    python -m benchmarks.accuracy --experiments shift                  # a group
    python -m benchmarks.accuracy --experiments "shift w4 bad 0"       # one experiment
    python -m benchmarks.accuracy --experiments text --arms averaging consensus
    python -m benchmarks.accuracy --experiments human --data-dir DIR   # needs images: see cifar.py for the layout

Finished runs are in OUT/accuracy_runs.jsonl, and a second start goes on where the first stopped.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.accuracy import harm, peers, report
from benchmarks.accuracy.arms import ARMS, all_runs
from benchmarks.accuracy.cifar import CIFARS
from benchmarks.accuracy.declare import Experiment, Run
from benchmarks.accuracy.experiments import EXPERIMENTS, GROUPS, quick
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.work import make
from benchmarks.command_line import described, new_folder, positive

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = _given(arguments)
    if given.list:
        print("\n".join(f"{e.group:<11} {e.name}" for e in EXPERIMENTS.values()))
        return
    torch.set_num_threads(1)
    store = Store(given.out / "accuracy_runs.jsonl")
    for group, question in GROUPS.items():
        shown = [e for e in EXPERIMENTS.values() if e.group == group]
        chosen = [e for e in shown if {e.name, group} & set(given.experiments)]
        if given.quick:
            shown, chosen = [[quick(e) for e in part] for part in (shown, chosen)]
        if not chosen:
            continue
        if not given.tables_only:
            print(f"{group}: {question}")
            wanted = [_only(e, given.arms) for e in _at_hand(chosen, given.data_dir)]
            make(_runs_at_hand(wanted), store, given.data_dir, given.jobs)
        command = f"python -m benchmarks.accuracy --experiments {group}" + " --quick" * given.quick
        report.write(group, question, shown, store, given.out, command)
    harm.write([quick(e) if given.quick else e for e in EXPERIMENTS.values()], store, given.out)


def _at_hand(experiments: Sequence[Experiment], folder: Path | None) -> list[Experiment]:
    """Return the experiments whose data is at hand, and name the others on the screen."""
    left_out = [e for e in experiments if e.base.data in CIFARS and folder is None]
    for e in left_out:
        print(f"left out, needs --data-dir: {e.name}")
    return [e for e in experiments if e not in left_out]


def _only(experiment: Experiment, arms: Sequence[str]) -> Experiment:
    """Return the experiment with these of its arms."""
    return replace(experiment, arms=tuple(arm for arm in experiment.arms if arm in arms))


def _runs_at_hand(experiments: Sequence[Experiment]) -> list[Run]:
    """Return the runs whose packages are at hand, and say how many others there are."""
    runs = all_runs(experiments)
    if peers.at_hand():
        return runs
    found = [run for run in runs if not peers.needed_by(run)]
    if len(found) < len(runs):
        print(f"left out: {len(runs) - len(found)} runs of others' rules, which need: pip install byzfl byzpy")
    return found


def _given(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = described(__doc__)
    add = parser.add_argument
    add("--experiments", nargs="+", default=list(GROUPS), metavar="NAME", help="names or groups; default: all")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="train these alone")
    add("--list", action="store_true", help="print the experiments' names and stop")
    add("--quick", action="store_true", help="twenty steps of one seed: does it run?")
    add("--out", type=new_folder, help="default: benchmarks/results, with --quick runs/accuracy_quick")
    add("--data-dir", type=Path, help="folder of the images that do not come with a package")
    add("--jobs", type=positive, default=os.cpu_count(), help="runs at a time; default: one per core")
    add("--tables-only", action="store_true", help="make no runs, write what there is")
    given = parser.parse_args(arguments)
    if unknown := set(given.experiments) - {*GROUPS, *EXPERIMENTS}:
        parser.error(f"--experiments must be groups or names from --list, found {', '.join(sorted(unknown))}")
    if given.data_dir is not None and not given.data_dir.is_dir():
        parser.error(f"--data-dir must be a folder, found {given.data_dir}")
    given.out = given.out or new_folder("runs/accuracy_quick" if given.quick else str(RESULTS))
    return given


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    main()
