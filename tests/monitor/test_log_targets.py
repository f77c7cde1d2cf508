"""Where AgreementLog writes: files, TensorBoard, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest

from gaf_ddp import AgreementLog, GAFState
from tests.monitor.logged import FINE, records, take


class TestFile:
    def write(self, path: Path, steps: int = 3, begun: int = 0) -> None:
        state = GAFState()
        log = AgreementLog(state, path, every=1)
        state.step = begun
        for _ in range(steps):
            take(state, FINE)
            log.step()

    def test_is_appended_to_and_an_incomplete_line_makes_room(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        self.write(path)
        whole = path.read_bytes()
        for cut in (1, 20, len(whole.splitlines()[-1])):
            path.write_bytes(whole[:-cut])
            self.write(path, steps=1, begun=2)
            assert [record["step"] for record in records(path)] == [1, 2, 3]

    @pytest.mark.parametrize("content", [b"something else", b"\x89PNG", b'{"loss": 1}\n'])
    def test_of_something_else_is_refused_and_not_touched(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"notes\.txt must be a log to append to, found"):
            AgreementLog(GAFState(), path)
        assert path.read_bytes() == content

    def test_that_cannot_be_written_costs_its_lines_and_not_the_training(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        state, path = GAFState(), folder / "log.jsonl"
        log = AgreementLog(state, path, every=1)
        folder.rmdir()
        with caplog.at_level(logging.WARNING):
            take(state, FINE)
            log.step()
        assert "step 1 is missing in the log" in caplog.text
        folder.mkdir()
        take(state, FINE)
        log.step()
        assert [record["step"] for record in records(path)] == [2]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None,), {}, "state must be a GAFState, found NoneType"),
        ((GAFState(), 7), {}, "a target must be a path, a SummaryWriter or a callable, found int"),
        ((GAFState(),), {"every": 0}, "every must be an integer >= 1, found 0"),
        ((GAFState(),), {"cosine_every": 2.0}, "cosine_every must be an integer >= 1, found 2.0"),
        ((GAFState(),), {"rank": -1}, "rank must be an integer >= 0 or None, found -1"),
        ((GAFState(), "/no/such/folder/log"), {}, "a log must be a file in an existing folder, found '/no"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        AgreementLog(*arguments, **options)


def test_reaches_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    state = GAFState()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        log = AgreementLog(state, writer, every=2)
        for _ in range(4):
            take(state, FINE)
            log.step()
    events = loader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("gaf/kept_rank_02")] == [(2, 1), (4, 1)]
    (image,) = events.Images("gaf/cosine")
    assert min(image.width, image.height) >= 72  # with labels where matplotlib is installed
