"""AgreementLog: records over the steps between them, wherever they go, at no host sync in between."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gaf_ddp import GAFState, gaf_hook
from gaf_ddp.monitor.log import AgreementLog
from gaf_ddp.monitor.log_reader import read
from gaf_ddp.monitor.log_sentences import sentences
from gaf_ddp.runtime import device as devices
from tests.monitor.decisions import end_step, made
from tests.monitor.logged import FINE, SPOILT, records, take
from tests.nets import batches, ddp, mlp
from tests.syncs import HostSyncs


class Writer:
    """What AgreementLog asks of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[float, int]]] = {}
        self.images: list[tuple[str, Tensor, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append((value, step))

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        self.images.append((name, image, step))


class TestRecords:
    def test_cover_the_steps_between_them_whatever_the_user_reads(self, tmp_path: Path) -> None:
        state, path, writer, dicts = GAFState(), tmp_path / "log.jsonl", Writer(), list[dict[str, float]]()
        log = AgreementLog(state, path, writer, dicts.append, every=10, cosine_every=20)
        for step in range(1, 41):
            take(state, SPOILT if step > 20 and step % 2 else FINE)
            log.step()
            log.step()  # as where gradients are accumulated: nothing new
            if step % 7 == 0:
                state.summary()
        kept = [[rank["kept"] for rank in record["ranks"]] for record in records(path)]
        assert kept == [[1, 1, 1], [1, 1, 1], [1, 1, 0.5], [1, 1, 0.5]]
        assert [record["ranks"][2]["nonfinite"] for record in records(path)] == [0, 0, 0.5, 0.5]
        assert [record["step"] for record in records(path)] == [10, 20, 30, 40]
        assert [record["decisions"] for record in records(path)] == [10] * 4
        assert [record["cosine"] is not None for record in records(path)] == [True, True, False, True]
        assert writer.scalars["gaf/kept_rank_02"] == [(1, 10), (1, 20), (0.5, 30), (0.5, 40)]
        assert [step for _, _, step in writer.images] == [10, 20, 40]
        assert [found["gaf/step"] for found in dicts] == [10, 20, 30, 40]
        assert all(math.isfinite(value) for found in dicts for value in found.values())

    def test_leave_the_state_s_own_statistics_alone(self, tmp_path: Path) -> None:
        with_log, without = GAFState(), GAFState()
        log = AgreementLog(with_log, tmp_path / "log.jsonl", every=1)
        for step in range(9):
            for state in (with_log, without):
                take(state, SPOILT if step % 3 else FINE)
            log.step()
        assert with_log.summary() == without.summary()

    def test_average_over_a_step_s_buckets_and_tell_what_no_number_is_by_null(self, tmp_path: Path) -> None:
        state, path = GAFState(tau=0.9), tmp_path / "log.jsonl"
        log = AgreementLog(state, path, every=1)
        take(state, FINE, SPOILT)
        log.step()
        (record,) = records(path)
        assert record["decisions"] == 2
        assert [rank["kept"] for rank in record["ranks"]] == [1, 1, 0.5]
        assert {rank["distance"] for rank in record["ranks"]} == {None}
        assert record["ratio"] is None
        assert record["cosine"][0][1] == pytest.approx(0.2 / 1.2, rel=1e-5)
        assert record["cosine"][0][2] == pytest.approx(0.2 / 1.2 / 2, rel=1e-5)  # 0 in the bucket it is absent from

    @pytest.mark.parametrize("begun", [0, 1, 99, 100, 350])
    def test_come_at_multiples_also_after_a_restart(self, begun: int, tmp_path: Path) -> None:
        state, path = GAFState(), tmp_path / "log.jsonl"
        log = AgreementLog(state, path, every=100)
        state.step = begun  # as load_state_dict does, perhaps after the log was made
        for _ in range(230):
            take(state, FINE)
            log.step()
        assert [record["step"] for record in records(path)] == [
            step for step in range(100, 600, 100) if begun < step <= begun + 230
        ]

    def test_are_of_the_steps_since_a_checkpoint_was_loaded(self, tmp_path: Path) -> None:
        saved, state, path = GAFState(tau=0.9), GAFState(tau=0.9), tmp_path / "log.jsonl"
        for _ in range(5):
            take(saved, SPOILT)
        log = AgreementLog(state, path, every=3)
        for _ in range(2):  # the second time it goes back
            state.load_state_dict(saved.state_dict())
            for _ in range(4):
                take(state, FINE)
                log.step()
        assert [record["step"] for record in records(path)] == [6, 9, 6, 9]
        assert [record["decisions"] for record in records(path)] == [1, 3, 1, 3]
        assert {record["gaf/kept_fraction"] for record in records(path)} == {1.0}

    def test_have_no_share_for_who_has_finished(self, tmp_path: Path) -> None:
        state, path, dicts = GAFState(tau=0.9), tmp_path / "log.jsonl", list[dict[str, float]]()
        log = AgreementLog(state, path, dicts.append, every=4)
        for step in range(12):
            end_step(state, made([True, True, step < 6], finished=[False, False, step >= 6]))
            log.step()
        assert [record["ranks"][2]["kept"] for record in records(path)] == [1, 1, None]
        assert [record["ranks"][2]["zero"] for record in records(path)] == [0, 0, 0]
        assert ["gaf/kept_rank_02" in found for found in dicts] == [True, True, False]
        assert sentences(read(path)) == [
            "No rank is out at step 12: all are kept.",
            "Rank 2 has finished: it is out of inputs.",
        ]

    def test_are_none_where_nothing_was_decided(self, tmp_path: Path) -> None:
        state, path = GAFState(), tmp_path / "log.jsonl"
        log = AgreementLog(state, path, every=1)
        log.step()
        end_step(state)
        take(state, torch.zeros(3, 3))
        log.step()
        assert not path.exists()


def test_waits_for_the_device_in_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_HOST", "no device")
    state = GAFState(tau=0.9)
    log = AgreementLog(state, lambda found: None, every=100)
    seen = []
    for _ in range(200):
        take(state, FINE)
        with HostSyncs() as syncs:
            log.step()
        seen.append(len(syncs.calls))
    assert [step for step, calls in enumerate(seen, 1) if calls] == [100, 200]


def train(device: torch.device, folder: Path) -> dict[str, Any]:
    """Train with one rank's labels wrong; return what this rank's logs wrote, and what its state says."""
    import torch.distributed as dist

    rank = dist.get_rank()
    model, state = ddp(mlp(), device), GAFState()
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = AgreementLog(state, folder / f"first-{rank}.jsonl", every=10)
    every = AgreementLog(state, folder / f"every-{rank}.jsonl", every=10, rank=None)
    for step, (inputs, _) in enumerate(batches(0, 40)):  # the same on all, but for a gradient that is far too long
        optimizer.zero_grad()
        loss = (model(inputs.to(device)) - 1).square().mean()
        (loss * (1000 if rank == 2 and step >= 20 else 1 + 0.1 * rank)).backward()
        optimizer.step()
        first.step()
        every.step()
    return {"summary": state.summary(), "agreement": state.agreement}


def test_on_ranks(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    found = ranks(3, train, tmp_path)
    assert [(tmp_path / f"first-{rank}.jsonl").exists() for rank in range(3)] == [True, False, False]
    logs = [records(tmp_path / f"every-{rank}.jsonl") for rank in range(3)]
    for log in (records(tmp_path / "first-0.jsonl"), *logs):
        assert [record["ranks"] for record in log] == [record["ranks"] for record in logs[0]]
    assert [[rank["kept"] for rank in record["ranks"]] for record in logs[0]] == [[1, 1, 1]] * 2 + [[1, 1, 0]] * 2
    assert [record["ranks"][2]["overlong"] for record in logs[0]] == [0, 0, 1, 1]
    distances = [rank["distance"] for rank in logs[0][-1]["ranks"]]
    assert distances == pytest.approx(found[0]["agreement"].distance.tolist(), rel=1e-4)
    assert found[0]["summary"]["gaf/kept_rank_02"] == 0.5
