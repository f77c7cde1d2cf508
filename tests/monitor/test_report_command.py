"""python -m gaf_ddp.report: what a log says, in sentences and in a picture; bad logs are one line."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gaf_ddp.monitor.report import LogError, absences, main, read, sentences

WORLD = 4


def record(step: int, kept: Sequence[float | None], **more: Any) -> dict[str, Any]:
    """Return a record; `more` are columns of the ranks, or the record's own."""
    columns: dict[str, list[Any]] = {
        "kept": list(kept),
        "host": [f"node-{rank // 2}" for rank in range(len(kept))],
        "distance": [1.0] * len(kept),
        **{name: [0.0] * len(kept) for name in ("trend", "nonfinite", "overlong", "zero", "flipped")},
        "out_since": [None] * len(kept),
        **{name: value for name, value in more.items() if isinstance(value, list)},
    }
    ranks = [{"rank": rank, **{name: column[rank] for name, column in columns.items()}} for rank in range(len(kept))]
    own = {name: value for name, value in more.items() if not isinstance(value, list)}
    return {"gaf_ddp_log": 1, "time": 0.0, "step": step, "decisions": 100, "ratio": 3.0, "ranks": ranks,
            "max_norm_ratio": 10.0, "gaf/skipped_fraction": 0.0, "cosine": None} | own  # fmt: skip


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def job(until: int = 500) -> list[dict[str, Any]]:
    """Return a log in which rank 2 is not finite from 100 to 200 and rank 1 is far from 300 on."""
    return [
        record(
            step,
            [1.0, 0.0 if step > 300 else 1.0, 0.1 if step == 200 else 1.0, 0.97],
            distance=[1.0, 0.02 * step if step > 300 else 1.0, 1.0, 1.1],
            trend=[0.0, 2.0 if step > 300 else 0.0, 0.0, 0.0],
            nonfinite=[0.0, 0.0, 0.9 if step == 200 else 0.0, 0.0],
        )
        for step in range(100, until + 1, 100)
    ]


class TestSentences:
    def test_say_who_is_out_since_when_where_and_why(self) -> None:
        assert sentences(job()) == [
            "Rank 1 on node-0 is out since step 301: it is far from the consensus, z = 10.0 where 3 is the limit, "
            "growing by 2.0 in 100 steps.",
            "Rank 2 on node-1 was out from step 101 to 200: its gradient is not finite.",
            "The other 3 ranks are kept in at least 97% of the last decisions.",
        ]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("nonfinite", "is not finite"),
            ("overlong", "has a norm over 10 medians"),
            ("zero", "is zero"),
            ("flipped", "is turned away from the others'"),
        ],
    )
    def test_name_each_reason(self, name: str, words: str) -> None:
        (absence,) = absences([record(100, [1, 0, 1, 1], **{name: [0.0, 1.0, 0.0, 0.0]})])
        assert words in absence.why

    def test_name_no_limit_that_is_not_known(self) -> None:
        (absence,) = absences([record(100, [1, 0, 1, 1], overlong=[0.0, 1.0, 0.0, 0.0], max_norm_ratio=None)])
        assert absence.why == "its gradient has a norm far over the median"

    def test_say_who_has_finished_and_do_not_call_it_out(self) -> None:
        log = [record(100, [1, 1, 1, 0.9]), record(200, [0.0, 1, None, None])]
        assert sentences(log)[1:] == [
            "Rank 2 on node-1 has finished: it is out of inputs.",
            "Rank 3 on node-1 has finished: it is out of inputs.",
            "The other one is kept in at least 100% of the last decisions.",
        ]

    def test_of_a_rule_without_distances_say_that_it_disagrees(self) -> None:
        (absence,) = absences([record(100, [0, 1, 1, 1], distance=[None] * 4, trend=[None] * 4, ratio=None)])
        assert absence.why == "it disagrees with those that are kept"

    def test_take_the_exact_step_where_a_record_knows_it(self) -> None:
        log = job()
        log[3]["ranks"][1]["out_since"] = 342  # what later ones say may be the last time it was kept for a step
        log[4]["ranks"][1]["out_since"] = 490
        assert [absence.since for absence in absences(log) if absence.rank == 1] == [342]
        (absence,) = absences([record(100, [0, 1, 1, 1], out_since=[37, None, None, None])])
        assert absence.since == 37

    def test_of_a_log_that_begins_late_do_not_say_that_all_began_at_step_1(self) -> None:
        (absence,) = absences([record(step, [1, 0, 1, 1]) for step in (1100, 1200)])
        assert absence.since == 1001

    def test_say_that_nobody_is_out_and_how_often_nothing_agreed(self) -> None:
        said = sentences([record(100, [0.9, 1, 1, 1], **{"gaf/skipped_fraction": 0.25}), record(200, [0.9, 1, 1, 1])])
        assert said == [
            "No rank is out at step 200: the least kept is rank 0, 90%.",
            "In 12% of all decisions nothing agreed.",
        ]


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
            assert "--out must be a .png" in capsys.readouterr().err

    @pytest.mark.job
    def test_without_matplotlib_says_what_to_install(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.modules['matplotlib'] = None; from gaf_ddp.monitor.report import main; main(sys.argv[1:])"
        )
        log = write(tmp_path / "log", *job())
        command = [sys.executable, "-c", code, str(log), "--out", str(tmp_path / "a.png")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 2
        assert "pip install 'gaf-ddp[report]'" in ended.stderr
        assert "Rank 1 on node-0 is out" in ended.stdout
