"""The table of faults in its short form: no hang, survivors equal and told in time."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.faults.__main__ import shortened, table
from benchmarks.faults.declare import FAULTS, PLAIN, SETUPS, Fault
from benchmarks.faults.job import Outcome, run

CASES = {
    ("late", "killed inside ballot"): "onnection",
    ("sharded, model", "killed after scatter"): "gaf_ddp: step 3",
    ("gather, bucket", "weighting returns NaN on all ranks"): r"weighting must return finite weights >= 0",
    ("late", "stopped for 3 s"): "^$",
    ("late", "hook missing on one rank"): "is the hook on every rank.*lost rank",
    ("late", "torch.OutOfMemoryError in the hook on one rank"): "onnection",
}
BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.mark.job
def test_nothing_hangs_nothing_differs() -> None:
    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(lambda case: run(case[0], BY_NAME[case[1]]), CASES))
    for outcome, said in zip(outcomes, CASES.values(), strict=True):
        assert outcome.is_fine, outcome
        assert outcome.verdict == ("finished" if outcome.fault.finishes else "raised"), outcome
        assert all(re.search(said, text) for text in outcome.said), outcome
        if "memory" in outcome.fault.what:
            assert outcome.victim == "OutOfMemoryError: device out of memory"


def test_every_fault_is_named_and_met() -> None:
    assert len(BY_NAME) == len(FAULTS)
    assert all(any(fault.meets(setup) for setup in SETUPS) for fault in FAULTS)
    assert not BY_NAME["killed inside sum"].meets(PLAIN)
    assert not BY_NAME["killed inside sum"].meets("late")
    assert not BY_NAME["killed inside ballot"].meets("sketch, model")


def test_the_table_shows_what_is_wrong() -> None:
    fault, setup = Fault("kill", "end"), "late"
    fine = Outcome(setup, fault, "raised", 0.1, 0.2, True, ["RuntimeError: lost rank 1"], "nothing")
    bad = [fine._replace(verdict="HANG"), fine._replace(equal=False), fine._replace(seconds=10.5)]
    bad += [fine._replace(fault=Fault("stop", seconds=3, finishes=True))]
    assert fine.is_fine
    assert not any(outcome.is_fine for outcome in bad)
    assert "| killed after backward | raised 0.1 s |" in table({(fault.name, setup): fine}, [setup])
    assert "| **HANG** |" in table({(fault.name, setup): bad[0]}, [setup])


def test_messages_are_told_without_what_differs_between_runs() -> None:
    told = "rank 2 lost rank 1: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Closed [10.0.0.2]:4711"
    assert shortened(told) == "rank r lost rank r: Closed ADDRESS"
