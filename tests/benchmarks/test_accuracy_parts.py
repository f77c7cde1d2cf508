"""The parts of the accuracy benchmark: labels, faults, random controls, the store."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.accuracy import harm, peers, text
from benchmarks.accuracy.arms import ARMS, PEERS, all_runs, runs_of
from benchmarks.accuracy.cifar import SUPERCLASSES
from benchmarks.accuracy.declare import PAST, Fault, Labels, Rule, Run, plain
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.faults import FAULTS, INSIDER, fault_named
from benchmarks.accuracy.gradients import all_gradients
from benchmarks.accuracy.rules import RandomMembers, RandomSkips, settings_of
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.summary import tables_of
from benchmarks.accuracy.task import augmented, build_task
from benchmarks.accuracy.transformer import Transformer
from gaf_ddp.rules.consensus import distances
from gaf_ddp.rules.memory import MOMENTUM
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


def test_a_balanced_batch_has_as_many_images_of_every_class_as_its_rank_sees_them() -> None:
    run = replace(RUN, batch=20, labels=Labels("shift", (1,)), balanced=True)
    task = build_task(run, None)
    drawn = [labels[draws] for labels, draws in zip(task.labels, task.draws, strict=True)]
    assert all((torch.stack([(each == c).sum(1) for c in range(10)]) == 2).all() for each in drawn)
    assert not torch.equal(task.draws[0], task.draws[1])
    kept = torch.randperm(len(task.labels[0]), generator=torch.Generator().manual_seed(0))[len(task.validation[1]) :]
    assert torch.isin(torch.cat([d.flatten() for d in task.draws]), kept).all()
    with pytest.raises(ValueError, match="multiple of its 10 classes, found 25"):
        build_task(replace(run, batch=25), None)


def test_uniform_noise_is_the_same_on_every_rank() -> None:
    task = build_task(replace(RUN, labels=Labels("uniform", share=0.4)), None)
    clean = build_task(RUN, None).labels[0]
    assert torch.equal(task.labels[0], task.labels[3])
    wrong = (task.labels[0] != clean).float()
    assert wrong.mean().item() == pytest.approx(0.4, abs=0.01)
    assert wrong[sorted(set(task.draws[0].flatten().tolist()))].mean().item() == pytest.approx(0.4, abs=0.06)
    validation = build_task(RUN, None).validation[1]
    assert (task.validation[1] != validation).float().mean().item() == pytest.approx(0.4, abs=0.12)


def test_augmented_images_are_shifted_and_half_of_them_turned() -> None:
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = augmented(images, torch.Generator().manual_seed(1), most=2)
    assert torch.equal(found, augmented(images, torch.Generator().manual_seed(1), most=2))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    shifts = [padded[:, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    straight, turned = (
        torch.stack([(each == found).flatten(1).all(1) for each in ways]).any(0)
        for ways in (shifts, [each.flip(3) for each in shifts])
    )
    assert (straight | turned).all()
    assert 8 < turned.sum() < 32


def test_superclasses_are_those_of_cifar_100() -> None:
    names = " ".join(SUPERCLASSES).split()
    assert (len(SUPERCLASSES), len(names), len(set(names))) == (20, 100, 100)


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


@pytest.mark.parametrize("kind", peers.ATTACKS)
def test_byzfl_attacks_are_made_from_the_honest_gradients(kind: str) -> None:
    byzfl = pytest.importorskip("byzfl")
    random = torch.Generator().manual_seed(0)
    honest, own = torch.randn(5, 100, generator=random), torch.randn(100, generator=random)
    sent = fault_named(kind)(honest, own, {}, random)
    assert sent.dtype == own.dtype
    torch.testing.assert_close(sent, getattr(byzfl, kind)()(honest).float())
    assert peers.needed_by(replace(RUN, fault=Fault(kind, 0)))


def test_attackers_who_know_the_rule_stay_just_within_its_reach() -> None:
    random = torch.Generator().manual_seed(0)
    momenta = torch.zeros(8, 200)
    memory: dict[str, torch.Tensor] = {}
    for _ in range(300):
        honest = 0.1 + torch.randn(7, 200, generator=random)
        sent = FAULTS[INSIDER](honest, honest[0], memory, random)
        momenta = MOMENTUM * momenta + torch.vstack([sent, honest])
        z = distances(momenta @ momenta.T, torch.ones(8, dtype=torch.bool))[0]
    assert 2.4 < float(z[0]) < 3.2
    assert float(momenta[0] @ momenta[1:].mean(0)) < float(momenta[1:].mean(0).square().sum())


def test_attackers_are_left_out_by_the_oracle_alone() -> None:
    experiment = EXPERIMENTS["attack 3 of 8"]
    assert experiment.base.fault == Fault(INSIDER, 0, (3, 6))
    assert ARMS["oracle"].runs(experiment)[0].ranks == (1, 2, 4, 5, 7)


@pytest.mark.parametrize(("ranks", "bad"), [(4, 1), (5, 2), (8, 3), (8, 2)])
def test_mixing_is_told_as_the_weights_byzfl_gives(ranks: int, bad: int) -> None:
    byzfl = pytest.importorskip("byzfl")
    rows = torch.randn(ranks, 500, generator=torch.Generator().manual_seed(ranks)) + 0.3
    rows[0] += 2
    weights = peers.mixing(bad)(rows @ rows.T)
    torch.testing.assert_close(weights @ rows, byzfl.MultiKrum(bad)(byzfl.NNM(bad)(rows)), atol=1e-5, rtol=1e-5)


def test_mixing_is_told_of_numbers_it_allows_only() -> None:
    runs = {arm: ARMS[arm].runs(EXPERIMENTS["shift w8 bad 0-3-6"]) for arm in PEERS}
    told = {arm: [run.rule.parameter for run in found] for arm, found in runs.items()}
    assert told == {
        "mixing": [3],
        "mixing less": [2],
        "mixing more": [],
        "mixing most": [],
        "clipping": [0.1, 1, 10],
    }
    assert [run.rule.parameter for run in ARMS["mixing most"].runs(EXPERIMENTS["broken none"])] == [3]


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
    """Else it would be made again: a declaration has changed since. What PAST alone had is history."""
    lines = (Path(benchmarks.__file__).parent / "results" / "accuracy_runs.jsonl").read_text().splitlines()
    declared = {run.key for run in all_runs(EXPERIMENTS.values())}
    runs = [json.loads(line)["run"] for line in lines]
    made = [run for run in runs if PAST not in json.dumps(run.get("rule", {}))]
    assert {json.dumps(run, sort_keys=True) for run in made} <= declared
    assert len(made) < len(runs)


def test_landed_runs_stand_beside_todays() -> None:
    store = Store(Path(benchmarks.__file__).parent / "results" / "accuracy_runs.jsonl")
    experiment = EXPERIMENTS["shift w4 bad 0"]
    assert all(run in store for run in runs_of(experiment, f"consensus{PAST}"))
    [(_, table)] = tables_of([experiment], store)
    assert table[f"consensus{PAST}"].title == "consensus (`GAFState()`), as of 7a1f1ee"
    assert list(ARMS).index(f"consensus{PAST}") == list(ARMS).index("consensus") + 1
    assert table[f"consensus: random members{PAST}"].kind == "control"


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


def test_no_harm_is_the_difference_over_seeds_in_cells_without_bad_ranks(tmp_path: Path) -> None:
    clean, bad = (EXPERIMENTS[name] for name in ("broken none", "shift w4 bad 0"))
    store = Store(tmp_path / "runs.jsonl")
    for experiment in (clean, bad):
        for arm, gain in (("averaging", 0.0), ("consensus", 0.5)):
            for run in runs_of(experiment, arm):
                final = 90 + 3 * run.seed + gain * run.seed
                store.add(run, {**RECORD, "final": final, "kept_by_rank": [1.0] * 7 + [0.2]})
    harm.write([clean, replace(clean, title="the same"), bad], store, tmp_path)
    lines = (tmp_path / "accuracy_harm.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| digits")] == [
        f"| {clean.title} | 93.0 | +0.50 ± 0.29 | 90.0 % | 20.0 % | 3 |  |"
    ]


@pytest.mark.job
def test_windows_of_text_ask_for_the_next_letter_and_differ() -> None:
    windows = text.windows(1)
    assert windows.shape == (text.TRAIN + text.TEST, text.CONTEXT + 1)
    assert "".join(text.LETTERS[i] for i in windows[0]).startswith('The "assert"')
    # The text itself says some things twice.
    assert len({tuple(window.tolist()) for window in windows}) > 0.99 * len(windows)
    task = build_task(replace(EXPERIMENTS["text rank 3 of 4 alone has the other register"].base, steps=2), None)
    shown, asked = task.batch(0, 0)
    assert torch.equal(shown[:, 1:], asked[:, :-1])
    assert 0 < int(task.few.sum()) < len(task.few)


@pytest.mark.job
def test_a_slow_rank_sees_the_hardest_windows_and_the_others_all() -> None:
    windows = text.windows(0)
    hard = text.hardest_quarter(windows)
    assert hard.float().mean().item() == pytest.approx(0.25, abs=0.001)
    task = build_task(replace(EXPERIMENTS["text rank 0 of 4 sees the hardest quarter only"].base, steps=50), None)
    shown = {tuple(window.tolist()) for window in windows[hard][:, :-1]}
    hard_shares = [sum(tuple(w.tolist()) in shown for w in task.images[d.flatten()]) / d.numel() for d in task.draws]
    assert hard_shares[0] == 1
    assert hard_shares[1:] == pytest.approx([0.25] * 3, abs=0.1)


def test_shuffled_targets_are_those_of_other_examples() -> None:
    clean, task = (build_task(replace(RUN, labels=labels), None) for labels in (Labels(), Labels("shuffled", (1,))))
    assert torch.equal(task.labels[0], clean.labels[0])
    assert torch.equal(task.labels[1].sort().values, clean.labels[1].sort().values)
    assert (task.labels[1] == clean.labels[1]).float().mean() < 0.2


def test_the_transformer_does_not_look_ahead() -> None:
    model, window = Transformer(16, 20), torch.randint(20, (2, 16))
    later = window.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 20
    scores, changed = model(window), model(later)
    torch.testing.assert_close(scores[:, :, :9], changed[:, :, :9])
    assert not torch.allclose(scores[:, :, 9:], changed[:, :, 9:])
