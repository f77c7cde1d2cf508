"""python -m gaf_ddp.report: it reads a log and draws it; bad logs are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gaf_ddp.monitor.log_reader import LogError, read
from gaf_ddp.monitor.report_command import main
from tests.monitor.logs import job, record, write


class TestRead:
    def test_lets_a_restarted_job_take_the_place_of_what_it_went_on_from(self, tmp_path: Path) -> None:
        again = [record(step, [1, 1, 1, 0]) for step in (300, 400)]
        found = read(write(tmp_path / "log", *job(500), *again))
        assert [each["step"] for each in found] == [100, 200, 300, 400]
        assert found[2:] == again

    def test_leaves_out_what_another_number_of_ranks_wrote(self, tmp_path: Path) -> None:
        found = read(write(tmp_path / "log", *job(300), record(400, [1, 1])))
        assert [each["step"] for each in found] == [400]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "No such file"),
            ("", "found an empty file"),
            ("step loss\n1 0.3\n", r"line 1, must be a record of AgreementLog, found 'step loss'"),
            ('{"loss": 1}\n', "line 1, must be a record of AgreementLog"),
            ("[1]\n", "line 1, must be a record of AgreementLog"),
            ("\x00\x01\n", "line 1, must be a record of AgreementLog"),
            ('{"gaf_ddp_log": 2}\n', "must be of version 1, found 2"),
            ('{"gaf_ddp_log": 1, "step": 3}\n', "must hold "),
            (json.dumps(record(100, [1, 1])) + "\n" + '{"gaf_ddp_log": 1, "st', "line 2, must end"),
        ],
    )
    def test_refuses_what_is_no_log_in_one_line_and_with_code_2(
        self, content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "log"
        if content is not None:
            path.write_text(content)
        with pytest.raises(LogError, match=words):
            read(path)
        with pytest.raises(SystemExit) as ended:
            main([str(path)])
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1


class TestPicture:
    def test_is_drawn_of_any_log(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib")
        many = [record(step, [1.0] * 40 + [0.0] * 24) for step in (1, 2, 3)]
        joined = [record(step, [1.0, None if step > 1 else 0.5]) for step in (1, 2, 3)]
        for number, log in enumerate((job(), job(100), many, joined)):
            out = tmp_path / f"{number}.png"
            main([str(write(tmp_path / "log", *log)), "--out", str(out)])
            assert out.read_bytes().startswith(b"\x89PNG")
            assert str(out) in capsys.readouterr().out

    def test_names_the_rank_and_has_units_and_no_distances_where_there_are_none(self) -> None:
        pytest.importorskip("matplotlib")
        from gaf_ddp.monitor.plot import figure

        drawn = figure(job())
        kept, distance, _ = drawn.axes
        assert drawn.get_suptitle() == "Rank 1 of 4, on node-0, is out since step 301"
        assert [label.get_text() for label in kept.get_yticklabels()][1] == "rank 1 on node-0"
        assert distance.get_xlabel() == "training step"
        assert "z" in distance.get_ylabel()
        without = [record(100, [1, 1, 0], distance=[None] * 3, trend=[None] * 3, ratio=None)]
        assert len(figure(without).axes) == 2

    def test_to_nowhere_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        log = str(write(tmp_path / "log", *job()))
        for out in ("/no/such/folder/a.png", str(tmp_path / "a.doc")):
            with pytest.raises(SystemExit) as ended:
                main([log, "--out", out])
            assert ended.value.code == 2
            assert "--out must end in .html, .png" in capsys.readouterr().err

    @pytest.mark.job
    def test_without_matplotlib_says_what_to_install(self, tmp_path: Path) -> None:
        code = "import sys; sys.modules['matplotlib'] = None; from gaf_ddp.report import main; main(sys.argv[1:])"
        log = write(tmp_path / "log", *job())
        command = [sys.executable, "-c", code, str(log), "--out", str(tmp_path / "a.png")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 2
        assert "pip install 'gaf-ddp[report]'" in ended.stderr
        assert "Rank 1 on node-0 is out" in ended.stdout
