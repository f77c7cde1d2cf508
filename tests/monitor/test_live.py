"""python -m gaf_ddp.report LOG --watch: in a terminal, and as a page; both while a job writes."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gaf_ddp.monitor import live, report_command
from gaf_ddp.monitor.log_reader import LogError
from tests.launch.jobs import environment
from tests.monitor.browser import look_at, needs_browser, pixels_of
from tests.monitor.logs import job, record, write

VERDICTS = {"trusted_since": [None, None, None, 120], "condemned_since": [None, 80, None, None]}


def _pauses(*between: Callable[[], object]) -> Callable[[], None]:
    """Return a pause that does one thing each time it is taken, and presses Ctrl-C when all is done."""
    left = list(between)

    def pause() -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    return pause


def _shown(path: Path, log: list[dict[str, object]], width: int = 120) -> str:
    console = pytest.importorskip("rich.console").Console(width=width, file=io.StringIO())
    console.print(live.view(path, log))
    return str(console.file.getvalue())


class TestFollow:
    def test_shows_each_state_of_the_file_once(self, tmp_path: Path) -> None:
        path, seen, log = tmp_path / "log", [], job()
        pause = _pauses(
            lambda: path.write_text(""),
            lambda: write(path, *log[:2]),
            lambda: None,
            lambda: path.write_text(path.read_text() + json.dumps(log[2])[:50]),  # in the middle of a line
            lambda: write(path, *log[:3]),
        )
        live.follow(path, lambda records: seen.append(len(records)), pause)
        assert seen == [0, 0, 2, 2, 3]

    def test_ends_with_one_line_when_it_is_no_log(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "log").write_text("step loss\n1 0.3\n")
        with pytest.raises(SystemExit) as ended:
            report_command.main([str(tmp_path / "log"), "--watch", "--out", str(tmp_path / "a.html")])
        assert ended.value.code == 2
        assert "line 1, must be a record of AgreementLog" in capsys.readouterr().err


class TestTerminal:
    def test_has_the_sentences_and_a_table_with_those_that_are_out_first(self, tmp_path: Path) -> None:
        shown = _shown(tmp_path / "log", job())
        assert "Rank 1 on node-0 is out since step 301" in shown
        rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in shown.splitlines() if line.startswith("│")]
        assert [row[0] for row in rows] == ["1", "0", "2", "3"]
        assert rows[0] == ["1", "0 %", "10.0", "-", "-", "-", "███▁▁", "node-0"]
        assert rows[2][-2] == "█▁███"

    def test_has_what_held_out_data_found_and_waits_for_a_first_record(self, tmp_path: Path) -> None:
        shown = _shown(tmp_path / "log", [record(200, [1, 0.6, None, 1], **VERDICTS)])
        assert re.search(r"│ 1 .*│ 80 ", shown)
        assert re.search(r"│ 3 .*│ 120 ", shown)
        assert "finished" in shown
        assert "Waiting for the job's first record" in _shown(tmp_path / "log", [])

    def test_a_pipe_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            report_command.main([str(write(tmp_path / "log", *job())), "--watch"])
        assert ended.value.code == 2
        assert "--watch must write to a terminal" in capsys.readouterr().err

    def test_without_rich_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "rich.live", None)
        with pytest.raises(LogError, match=r"--watch needs rich: pip install 'gaf-ddp\[report\]'"):
            live.in_terminal(tmp_path / "log")

    @pytest.mark.job
    def test_is_drawn_again_as_the_log_grows(self, tmp_path: Path) -> None:
        pytest.importorskip("rich")
        ours, theirs = pty.openpty()
        path = write(tmp_path / "log", *job()[:2])
        command = [sys.executable, "-m", "gaf_ddp.report", str(path), "--watch"]
        # A job in a shell's background ignores Ctrl-C, and so would what it starts.
        heeds: Any = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        told = environment(TERM="xterm", COLUMNS="120")
        with subprocess.Popen(command, stdout=theirs, env=told, **heeds) as watching:
            os.close(theirs)
            try:
                _await(ours, b"to step 200")
                write(path, *job())
                _await(ours, b"to step 500")
                watching.send_signal(signal.SIGINT)
                assert watching.wait(timeout=30) == 0
            finally:
                watching.kill()


def _await(terminal: int, words: bytes, seconds: float = 60.0) -> None:
    """Read what a terminal shows until the words are there."""
    shown, end = b"", time.monotonic() + seconds
    while words not in shown:
        assert select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0], shown
        shown += os.read(terminal, 10_000)


class TestPage:
    def test_needs_nothing_else_and_says_all(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        log = [record(step, [1, 0.6, None, 1], host=["<a>"] * 4, **VERDICTS) for step in (100, 200)]
        out = tmp_path / "page.html"
        report_command.main([str(write(tmp_path / "log", *log)), "--out", str(out)])
        page = out.read_text()
        assert not re.search(r"<script|<link|@import|url\(http|(src|href)=\"http", page)
        assert "held-out data speak against it" in page
        assert "<a>" not in page
        assert page.count("<svg") == page.count("<table") == 1
        assert page.count("<tr") == 1 + 4
        assert 'http-equiv="refresh"' not in page
        assert sorted(os.listdir(tmp_path)) == ["log", "page.html"]

    def test_reloads_itself_while_it_is_watched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib")
        path, out = tmp_path / "log", tmp_path / "page.html"
        found: list[str] = []
        pause = _pauses(lambda: found.append(out.read_text()), lambda: write(path, *job()))
        monkeypatch.setattr(live, "_pause", pause)
        report_command.main([str(path), "--watch", "--out", str(out)])
        assert "Waiting for the job" in found[0]
        for page in (found[0], out.read_text()):
            assert '<meta http-equiv="refresh" content="2">' in page
        assert "Rank 1 on node-0 is out since step 301" in out.read_text()

    def test_of_many_ranks_and_records_is_small(self) -> None:
        pytest.importorskip("matplotlib")
        from gaf_ddp.monitor.page import html

        log = [record(step, [1.0] * 60 + [0.0] * 4) for step in range(100, 50_000, 100)]
        assert len(html(log, Path("log"))) < 1_500_000

    @needs_browser
    @pytest.mark.job
    @pytest.mark.parametrize(("dark", "orange"), [(False, (179, 78, 0)), (True, (255, 155, 80))], ids=["light", "dark"])
    @pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
    def test_is_seen_in_a_browser(self, tmp_path: Path, dark: bool, orange: tuple[int, int, int], width: int) -> None:
        pytest.importorskip("matplotlib")
        out = tmp_path / "page.html"
        report_command.main([str(write(tmp_path / "log", *job())), "--out", str(out)])
        scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
        page, picture = look_at(out.as_uri(), tmp_path, scheme, size=(width, 1400))
        assert "Rank 1 on node-0 is out since step 301" in page
        assert pixels_of(picture, orange) > 200
