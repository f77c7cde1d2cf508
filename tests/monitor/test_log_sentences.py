"""What a log says in sentences: who is out, since when, where and why, what held-out data found, what to do next."""

import pytest

from gaf_ddp.monitor.absences import absences
from gaf_ddp.monitor.log_sentences import sentences
from tests.monitor.logs import job, record


def test_sentences_say_who_is_out_since_when_where_and_why() -> None:
    assert sentences(job()) == [
        "Rank 1 on node-0 is out since step 301: it is far from the consensus, z = 10.0 where 3 is the limit, "
        "growing by 2.0 in 100 steps.",
        "Rank 2 on node-1 was out from step 101 to 200: its gradient is not finite.",
        "The other 3 ranks are kept in at least 97% of the last decisions.",
        "Next, for rank 1: broken, or honest with data of its own? Give the filter held-out data (state.reference), "
        "or look at its data and its device.",
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
def test_sentences_name_each_reason(name: str, words: str) -> None:
    (absence,) = absences([record(100, [1, 0, 1, 1], **{name: [0.0, 1.0, 0.0, 0.0]})])
    assert words in absence.why


def test_sentences_name_no_limit_that_is_not_known() -> None:
    (absence,) = absences([record(100, [1, 0, 1, 1], overlong=[0.0, 1.0, 0.0, 0.0], max_norm_ratio=None)])
    assert absence.why == "its gradient has a norm far over the median"


def test_sentences_say_who_has_finished_and_do_not_call_it_out() -> None:
    log = [record(100, [1, 1, 1, 0.9]), record(200, [0.0, 1, None, None])]
    assert sentences(log)[1:] == [
        "Rank 2 on node-1 has finished: it is out of inputs.",
        "Rank 3 on node-1 has finished: it is out of inputs.",
        "The other one is kept in all of the last decisions.",
        "Next, for rank 0: broken, or honest with data of its own? Give the filter held-out data "
        "(state.reference), or look at its data and its device.",
    ]


def test_sentences_say_what_held_out_data_found() -> None:
    verdicts = {"trusted_since": [None, None, None, 120], "condemned_since": [None, 80, None, None]}
    log = record(200, [1, 0.6, 1, 1], host=["a", "a", "Host-B", "Host-B"], **verdicts)
    assert sentences([log]) == [
        "Rank 1 on a is out since step 80: held-out data speak against it.",
        "Rank 3 on Host-B is far from the others and kept since step 120: held-out data speak for it.",
        "The other 2 ranks are kept in all of the last decisions.",
        "Next, for rank 1: held-out data say it does harm: look at its data and its device.",
    ]
    log = record(200, [1, 0, 1, 1], out_since=[None, 60, None, None], **verdicts)
    assert sentences([log])[0] == (
        "Rank 1 on node-0 is out since step 60: held-out data speak against it since step 80."
    )


@pytest.mark.parametrize(
    ("scale", "words"),
    [(40.0, "would still make better steps"), (2.0, "would hardly make better steps"), (None, None)],
)
def test_sentences_say_over_how_many_batches_averaging_pays(scale: float | None, words: str | None) -> None:
    *_, last = sentences([record(100, [1, 1, 1, 1], **{"gaf/noise_scale": scale})])
    assert (words in last) if words else last.startswith("No rank is out")


@pytest.mark.parametrize(("name", "words"), [("nonfinite", "Numbers"), ("zero", "Nothing"), ("overlong", "Its loss")])
def test_sentences_say_what_to_do_next_for_each_reason(name: str, words: str) -> None:
    *_, last = sentences([record(100, [1, 0, 1, 0], **{name: [0.0, 1.0, 0.0, 1.0]})])
    assert last.startswith(f"Next, for ranks 1, 3: {words.lower()}")


def test_sentences_of_a_rule_without_distances_say_that_it_disagrees() -> None:
    (absence,) = absences([record(100, [0, 1, 1, 1], distance=[None] * 4, trend=[None] * 4, ratio=None)])
    assert absence.why == "it disagrees with those that are kept"


def test_sentences_take_the_exact_step_where_a_record_knows_it() -> None:
    log = job()
    log[3]["ranks"][1]["out_since"] = 342  # what later ones say may be the last time it was kept for a step
    log[4]["ranks"][1]["out_since"] = 490
    assert [absence.since for absence in absences(log) if absence.rank == 1] == [342]
    (absence,) = absences([record(100, [0, 1, 1, 1], out_since=[37, None, None, None])])
    assert absence.since == 37


def test_sentences_of_a_log_that_begins_late_do_not_say_that_all_began_at_step_1() -> None:
    (absence,) = absences([record(step, [1, 0, 1, 1]) for step in (1100, 1200)])
    assert absence.since == 1001


def test_sentences_say_that_nobody_is_out_and_how_often_nothing_agreed() -> None:
    said = sentences([record(100, [0.9, 1, 1, 1], **{"gaf/skipped_fraction": 0.25}), record(200, [0.9, 1, 1, 1])])
    assert said == [
        "No rank is out at step 200: the least kept is rank 0, 90%.",
        "In 12% of all decisions nothing agreed.",
    ]


def test_sentences_say_who_had_nan_now_and_then() -> None:
    log = [record(100, [1, 1, 0.98, 1], nonfinite=[0.0, 0.0, 0.02, 0.0]), record(200, [1, 1, 1, 1])]
    expected = round(0.02 * log[0]["decisions"])
    assert sentences(log) == [
        "No rank is out at step 200: all are kept.",
        f"Rank 2 on node-1 had NaN or infinity in {expected} decisions, the last one by step 100: "
        "look at its loss scale and its device.",
    ]


def test_sentences_say_that_and_until_when_everyone_was_averaged() -> None:
    watched, filtered = record(100, [1, 0, 1, 1], watch=True), record(200, [1, 0, 1, 1])
    first, second, *_ = sentences([watched])
    assert first == "Watching only: everyone is averaged. state.watch = False filters."
    assert second.startswith("Rank 1 on node-0 would be left out since step 1: ")
    first, second, *_ = sentences([watched, filtered])
    assert first == "Up to step 100 everyone was averaged (watch)."
    assert second.startswith("Rank 1 on node-0 is out since step 1: ")
