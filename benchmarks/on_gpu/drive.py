"""All stages in turn, each within its time; the page is written after each."""

import argparse
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.measure import say
from benchmarks.on_gpu.page import Outcome, page
from benchmarks.on_gpu.processes import run_processes
from benchmarks.on_gpu.rows import read_rows, said_by
from benchmarks.on_gpu.stages import STAGES, Stage

_LEAST = 10.0  # seconds: in less no process gets anywhere


def run_all(given: argparse.Namespace, facts: dict[str, object]) -> bool:
    """Run every stage; return whether nothing went wrong.

    given: the command line, of `__main__.arguments`. facts: for the page's head.
    """
    deadline = time.monotonic() + given.minutes * 60 - 3
    outcomes = {stage.name: Outcome(skipped=_reason_to_skip(stage, given)) for stage in STAGES}
    to_come = [stage.share for stage in STAGES if not outcomes[stage.name].skipped]
    done: dict[str, Outcome] = {}
    given.log.write_text("")
    for stage in STAGES:
        say(f"{stage.name} …")
        begun = time.monotonic()
        outcome = done[stage.name] = outcomes[stage.name]
        try:
            if not outcome.skipped:
                _run_stage(stage, given, outcome, begun + (deadline - begun) * stage.share / sum(to_come))
                to_come.remove(stage.share)
        except Exception as error:  # whatever it was, the other stages go on
            outcome.failures.append((said_by(error), traceback.format_exc()))
            to_come.remove(stage.share)
        finally:  # also where this run is ended from outside
            outcome.seconds = time.monotonic() - begun
            given.out.write_text(page(facts, done))
        failed = "".join(f"\n  failed: {wrong}" for wrong, _ in outcome.failures)
        say(f"{stage.name}: {outcome.skipped or f'{len(outcome.rows)} rows'}, {outcome.seconds:.0f} s{failed}")
    return not any(outcome.failures for outcome in outcomes.values())


def _reason_to_skip(stage: Stage, given: argparse.Namespace) -> str:
    if given.rehearse and not stage.rehearsed:
        return f"{stage.name} needs a GPU, and this is a rehearsal"
    if given.stages and stage.name not in given.stages:
        return "--stages does not name it"
    if stage.name == "accuracy" and given.data_dir is None:
        return "there is no --data-dir"
    return ""


def _run_stage(stage: Stage, given: argparse.Namespace, outcome: Outcome, deadline: float) -> None:
    """Run a stage's parts, each in an equal share of what the ones before it left."""
    parts = [part for part in stage.parts if not given.rehearse or part in stage.rehearsed]
    for place, part in enumerate(parts):
        seconds = (deadline - time.monotonic()) / (len(parts) - place)
        if seconds < _LEAST:
            outcome.failures.append((f"{part}: no time was left for it", ""))
            continue
        with tempfile.TemporaryDirectory() as folder:
            _run_part(stage, part, given, outcome, seconds, Path(folder))


def _run_part(
    stage: Stage, part: str, given: argparse.Namespace, outcome: Outcome, seconds: float, folder: Path
) -> None:
    file = folder / "rows.json"
    line = [
        "-m",
        "benchmarks.on_gpu",
        "--stage",
        stage.name,
        "--part",
        part,
        "--json",
        str(file),
        "--until",
        str(time.time() + seconds),
    ]
    line += ["--micro-batches", *map(str, given.micro_batches)]
    line += ["--rehearse"] * given.rehearse + (["--data-dir", str(given.data_dir)] if given.data_dir else [])
    wrong, printed = run_processes(line, stage.parts[part], seconds, folder, stage.environment)
    found = read_rows(file)
    outcome.rows += found.rows
    outcome.notes += found.notes
    outcome.failures += [(f"{part}: {error}", "") for error in found.errors]
    if wrong:
        outcome.failures.append((f"{part}: {wrong}", printed))
    with given.log.open("a") as log:
        log.write(f"=== {stage.name}, {part}: {wrong or 'done'}\n{printed}\n")
