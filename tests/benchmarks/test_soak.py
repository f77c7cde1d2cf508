"""The soak in its short form: replicas stay equal through everything, and what is held stays flat."""

import pytest

from benchmarks.soak.__main__ import HELD, page, run, slope
from benchmarks.soak.segments import SETTINGS, draw

pytestmark = pytest.mark.job
STEPS, LONGEST = 110, 9


def test_replicas_stay_equal_through_everything() -> None:
    ranks = run(STEPS, seed=1, with_filter=True, longest=LONGEST)
    for counts in ranks:
        assert counts["steps"] >= STEPS
        assert counts["compared"] >= STEPS // 10
        assert counts["differed"] == 0
    taken = ranks[0]["steps by state"]
    assert all(taken[str(i)] for i in range(len(SETTINGS)))  # every state was there
    assert ranks[0]["restarts"] > 0
    assert ranks[0]["joined"] > 0
    text = page({"with the filter": ranks}, seed=1)
    assert f"| with the filter | {ranks[0]['steps']:,} |" in text


def test_segments_hold_everything() -> None:
    segments = [draw(1, number) for number in range(300)]
    kinds = {kind for segment in segments for of_step in segment.kinds for kind in of_step}
    assert kinds == {"plain", "nan", "inf", "zero", "flipped", "huge", "tiny", "noise"}
    assert any(segment.unused for segment in segments)
    assert any(any(segment.local) for segment in segments)
    assert draw(1, 7) == draw(1, 7) != draw(2, 7)


def test_a_slope_is_found_with_its_error() -> None:
    for rise in (0, 3):
        samples = [{name: 100 + rise * i + i % 2 for name in HELD} | {"step": 100 * i} for i in range(40)]
        found, error = slope(samples, "threads")
        assert abs(found - 10 * rise) < 3 * error
