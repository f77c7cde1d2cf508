"""Sums over all decisions: against a reading one by one, as differences between two readings, saved and loaded."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gaf_ddp import Agreement
from gaf_ddp.monitor.totals import Totals, between, summary
from tests.monitor.decisions import decided, made, random_steps, some_decisions


def summed(*decisions: Agreement) -> dict[str, float]:
    totals = Totals()
    for each in decisions:
        totals.add([each])
    return summary(totals.read())


def told_one_by_one(decisions: list[Agreement]) -> dict[str, float]:
    """Return what a summary must say, from a reading one by one in plain numbers."""
    size, number = len(decisions[0].kept), len(decisions)
    rows = [
        {name: getattr(each, name).tolist() for name in ("kept", "voters", "nonfinite", "overlong", "cosine", "agreed")}
        | {"finished": [False] * size if each.finished is None else each.finished.tolist()}
        | {"distance": [math.nan] * size if each.distance is None else each.distance.tolist()}
        for each in decisions
    ]
    cosines = []
    for row in rows:
        pairs = [(i, j) for i in range(size) for j in range(size) if i != j and row["voters"][i] and row["voters"][j]]
        if pairs:
            cosines.append(sum(row["cosine"][i][j] for i, j in pairs) / len(pairs))

    def share(name: str) -> float:
        return sum(sum(row[name]) for row in rows) / (size * number)

    flags = ("voters", "nonfinite", "overlong", "finished")
    found = {
        "gaf/kept_fraction": sum(sum(row["kept"]) for row in rows)
        / (size * number - sum(sum(row["finished"]) for row in rows)),
        "gaf/skipped_fraction": sum(not row["agreed"] for row in rows) / number,
        "gaf/mean_cosine": sum(cosines) / len(cosines) if cosines else math.nan,
        "gaf/nonfinite_fraction": share("nonfinite"),
        "gaf/overlong_fraction": share("overlong"),
        "gaf/zero_fraction": sum(not any(row[name][rank] for name in flags) for row in rows for rank in range(size))
        / (size * number),
    }
    for rank in range(size):
        present = [row for row in rows if not row["finished"][rank]]
        z = [min(row["distance"][rank], 100.0) for row in rows if not math.isnan(row["distance"][rank])]
        kept = sum(row["kept"][rank] for row in present)
        found[f"gaf/kept_rank_{rank:02d}"] = kept / len(present) if present else math.nan
        found[f"gaf/distance_rank_{rank:02d}"] = sum(z) / len(z) if z else math.nan
    if all(math.isnan(z) for row in rows for z in row["distance"]):
        return {name: value for name, value in found.items() if "distance" not in name}
    return found


@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_a_reading_one_by_one_between_any_two_moments(world_size: int, seed: int) -> None:
    totals, dice = Totals(), random.Random(seed)
    seen: list[Agreement] = []
    moments = [(0, totals.read())]
    for decisions in random_steps(world_size, 60, seed).values():
        totals.add(decisions)
        seen += decisions
        if dice.random() < 0.2:
            moments.append((len(seen), totals.read()))
            totals.load(json.loads(json.dumps(totals.read())))  # as a job that goes on
    moments.append((len(seen), totals.read()))
    for i, (begin, before) in enumerate(moments):
        for end, after in moments[i + 1 :]:
            expected = told_one_by_one(seen[begin:end]) if end > begin else {}
            assert summary(between(before, after)) == pytest.approx(expected, nan_ok=True, abs=1e-9)


class TestSummary:
    def test_is_empty_before_any_decision(self) -> None:
        assert summed() == {}

    def test_averages_the_decisions(self) -> None:
        assert summed(*some_decisions()) == pytest.approx(
            {
                "gaf/kept_fraction": (4 + 2 + 0) / 12,
                "gaf/skipped_fraction": 1 / 3,
                "gaf/mean_cosine": (1 + 1 - 0.5) / 3,
                "gaf/nonfinite_fraction": 1 / 12,
                "gaf/overlong_fraction": 1 / 12,
                "gaf/zero_fraction": 2 / 12,
                "gaf/kept_rank_00": 1 / 3,
                "gaf/kept_rank_01": 1 / 3,
                "gaf/kept_rank_02": 2 / 3,
                "gaf/kept_rank_03": 2 / 3,
            }
        )

    def test_leaves_decisions_without_pairs_out_of_the_mean_cosine(self) -> None:
        alone, pair = decided(torch.diag(torch.tensor([1.0, 0.0]))), decided(torch.tensor([[1.0, 0.25], [0.25, 1.0]]))
        assert math.isnan(summed(alone)["gaf/mean_cosine"])
        assert summed(alone, pair)["gaf/mean_cosine"] == 0.25

    def test_has_distances_where_a_rule_knows_them(self) -> None:
        plain = decided(torch.eye(3))
        assert not any("distance" in name for name in summed(plain))
        far = [made([True] * 3, z) for z in ([1.0, 1e20, math.nan], [2.0, 4.0, math.nan])]  # the farthest counts as 100
        found = summed(plain, *far)
        distances = [found[f"gaf/distance_rank_{rank:02d}"] for rank in range(3)]
        assert distances == pytest.approx([1.5, 52.0, math.nan], nan_ok=True)

    def test_counts_who_has_finished_neither_as_zero_nor_as_left_out(self) -> None:
        both, one = made([True, True], finished=[False, False]), made([True, False], finished=[False, True])
        found = summed(both, one, one)
        assert (found["gaf/kept_fraction"], found["gaf/kept_rank_01"], found["gaf/zero_fraction"]) == (1, 1, 0)
        found = summed(one)
        assert found["gaf/kept_fraction"] == 1
        assert math.isnan(found["gaf/kept_rank_01"])

    def test_starts_anew_for_another_world_size(self) -> None:
        found = summed(decided(torch.eye(4)), decided(torch.ones(3, 3)))
        assert found["gaf/skipped_fraction"] == 0
        assert "gaf/kept_rank_03" not in found


class TestLoad:
    def test_goes_on_from_what_was_read(self) -> None:
        one, other = Totals(), Totals()
        first, *rest = some_decisions()
        one.add([first])
        other.load(one.read())
        other.add(rest)
        assert summary(other.read()) == summed(first, *rest)
        assert summary(one.read())["gaf/kept_fraction"] == 1  # not touched by the copy that went on

    def test_what_is_read_has_the_same_keys_always_and_plain_numbers(self) -> None:
        totals = Totals()
        empty = totals.read()
        totals.add(some_decisions())
        full = totals.read()
        assert empty.keys() == full.keys()
        assert set(map(len, empty.values())) == {0}
        assert set(map(len, full.values())) == {1, 4}
        assert {type(number) for numbers in full.values() for number in numbers} == {float}

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: None,
            lambda state: {},
            lambda state: {**state, "more": []},
            lambda state: {name: numbers for name, numbers in state.items() if name != "kept"},
            lambda state: {**state, "kept": state["kept"][1:]},
            lambda state: {**state, "decisions": []},
            lambda state: {**state, "kept": 4.0},
            lambda state: {**state, "kept": None},
            lambda state: {**state, "kept": ["1"] * 4},
            lambda state: {**state, "kept": [True] * 4},
            lambda state: {**state, "kept": [math.nan] * 4},
            lambda state: {**state, "skipped": [None]},
            lambda state: {name: [] if len(numbers) == 1 else numbers for name, numbers in state.items()},
        ],
    )
    def test_anything_else_is_refused_and_changes_nothing(self, change: Callable[[Any], Any]) -> None:
        totals = Totals()
        totals.add(some_decisions())
        before = totals.read()
        with pytest.raises(ValueError, match=r"totals must hold lists of finite numbers as state_dict\(\) returns"):
            totals.load(change(before))
        assert totals.read() == before
