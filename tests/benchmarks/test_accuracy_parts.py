"""The parts of the accuracy benchmark: labels, faults, random controls, the store."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.accuracy.arms import ARMS, all_runs, runs_of
from benchmarks.accuracy.declare import Labels, Rule, Run, plain
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.faults import FAULTS
from benchmarks.accuracy.gradients import all_gradients
from benchmarks.accuracy.rules import RandomMembers, RandomSkips, settings_of
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.summary import tables_of
from benchmarks.accuracy.task import build_task
from launch.models import build_model

RUN = Run("digits", "mlp", (0, 1, 2, 3), 20, steps=40, lr=0.05)
RECORD = {"final": 90.0, "best": 91.0, "stopped": 89.0, "few": 90.0, "curve": [90.0], "kept": 1.0, "skipped": 0.0,
          "kept_by_rank": [], "counts": [4, 0, 35], "seconds": 1.0}  # fmt: skip


def test_only_the_bad_rank_has_shifted_labels() -> None:
    clean = build_task(RUN, None)
    task = build_task(replace(RUN, labels=Labels("shift", (1,))), None)
    assert torch.equal(task.labels[0], clean.labels[0])
    assert torch.equal(task.labels[1], (clean.labels[1] + 1) % 10)
    assert torch.equal(task.draws[1], clean.draws[1])
    wrong = task.validation[1] != clean.validation[1]
    assert wrong.float().mean().item() == pytest.approx(1 / 4, abs=0.02)


def test_validation_is_never_drawn() -> None:
    task = build_task(RUN, None)
    drawn = torch.cat([d.flatten() for d in task.draws])
    order = torch.randperm(len(task.labels[0]), generator=torch.Generator().manual_seed(0))
    assert not torch.isin(drawn, order[: len(task.validation[1])]).any()


def test_uniform_noise_is_the_same_on_every_rank() -> None:
    task = build_task(replace(RUN, labels=Labels("uniform", share=0.4)), None)
    clean = build_task(RUN, None).labels[0]
    assert torch.equal(task.labels[0], task.labels[3])
    wrong = (task.labels[0] != clean).float()
    assert wrong.mean().item() == pytest.approx(0.4, abs=0.01)
    assert wrong[sorted(set(task.draws[0].flatten().tolist()))].mean().item() == pytest.approx(0.4, abs=0.06)
    validation = build_task(RUN, None).validation[1]
    assert (task.validation[1] != validation).float().mean().item() == pytest.approx(0.4, abs=0.12)


def test_ranks_with_their_own_classes_draw_nothing_else() -> None:
    run = replace(RUN, ranks=(0, 1), labels=Labels("own classes", classes=((0, 1, 2), (3,))))
    task = build_task(run, None)
    assert set(task.labels[1][task.draws[1]].flatten().tolist()) == {3}


def test_oracle_leaves_out_the_bad_ranks() -> None:
    oracle = ARMS["oracle"].runs(EXPERIMENTS["shift w8 bad 0-3-6"])[0]
    assert oracle.ranks == (1, 2, 4, 5, 7)
    assert ARMS["oracle"].runs(EXPERIMENTS["uniform w2 40%"])[0].labels == Labels()


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_change_the_gradient(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    honest = torch.randn(7, 100, generator=random)
    memory: dict[str, torch.Tensor] = {}
    FAULTS[kind](honest, torch.randn(100, generator=random), memory, random)
    own = torch.randn(100, generator=random)
    sent = FAULTS[kind](honest, own, memory, random)
    assert sent.shape == own.shape
    assert not torch.equal(sent, own)


def test_random_members_copies_the_counts_among_voters() -> None:
    gramian = torch.eye(5)
    gramian[2, 2] = 0  # no voter
    rule = RandomMembers([3, 0, 5], seed=1)
    assert [int((rule(gramian) > 0).sum()) for _ in range(3)] == [3, 0, 4]
    assert RandomMembers([5], seed=1)(gramian)[2] == 0


def test_random_skips_copies_the_number_of_skips() -> None:
    counts = [4, 0, 2, 0, 0, 3]
    rule = RandomSkips(counts, seed=0)
    taken = [bool(rule(torch.eye(4)).any()) for _ in counts]
    assert taken.count(False) == 3


def test_a_control_without_the_run_it_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="counts must hold 40 steps"):
        settings_of(replace(RUN, rule=Rule("random skips", like=Rule("neighborhood", 0.9))))


def test_runs_that_are_repeated_come_first() -> None:
    runs = all_runs([EXPERIMENTS["shift w4 bad 0"]])
    seen: set[str] = set()
    for run in runs:
        assert run.rule.like is None or replace(run, rule=run.rule.like).key in seen
        seen.add(run.key)


def test_a_declaration_is_what_differs_from_the_defaults() -> None:
    run = replace(RUN, seed=2, labels=Labels("shift", (1,)), rule=Rule("random skips", like=Rule("krum", 1.0)))
    told = {
        "seed": 2,
        "labels": {"kind": "shift", "ranks": (1,)},
        "rule": {"name": "random skips", "like": {"name": "krum", "parameter": 1.0}},
    }
    assert plain(run) == plain(RUN) | told
    assert set(plain(RUN)) == {"data", "model", "ranks", "batch", "steps", "lr"}


def test_every_committed_run_is_declared() -> None:
    """Else it would be made again: a declaration has changed since."""
    lines = (Path(benchmarks.__file__).parent / "results" / "accuracy_runs.jsonl").read_text().splitlines()
    declared = {run.key for run in all_runs(EXPERIMENTS.values())}
    assert {json.dumps(json.loads(line)["run"], sort_keys=True) for line in lines} <= declared


def test_store_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Store(path).add(RUN, RECORD)
    with path.open("a") as file:
        file.write('{"key": "abc", "rec')
    store = Store(path)
    assert RUN in store
    assert store.counts(RUN) == [4, 0, 35]
    store.add(replace(RUN, seed=1), RECORD)
    assert replace(RUN, seed=1) in Store(path)


def test_best_lr_is_the_one_with_the_highest_mean(tmp_path: Path) -> None:
    experiment = replace(EXPERIMENTS["shift w3 bad 1"], arms=("averaging", "best lr"), seeds=2, real_arms=())
    store = Store(tmp_path / "runs.jsonl")
    for run in all_runs([experiment]):
        store.add(run, {**RECORD, "final": 80 + 100 * run.lr + run.seed, "counts": []})
    [(_, table)] = tables_of([experiment], store)
    assert table["best lr"].title == "averaging, best lr (0.2)"
    assert table["best lr"].final.mean == pytest.approx(100.5)
    assert table["averaging"].final.mean == pytest.approx(85.5)
    assert len(runs_of(experiment, "best lr")) == 12


def test_gradients_at_once_equal_those_of_a_rank_alone() -> None:
    model = build_model("mlp", (1, 8, 8), 10)
    batches = [(torch.rand(5, 1, 8, 8), torch.randint(10, (5,))) for _ in range(3)]
    rows = all_gradients(model, batches)
    for row, batch in zip(rows, batches, strict=True):
        loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(row, expected)
    wrapped = torch.nn.Sequential(model, torch.nn.Identity())  # a layer it does not know: rank by rank
    torch.testing.assert_close(all_gradients(wrapped, batches), rows)
