"""A job that stands still before the first bucket says so."""

import time

import pytest

from gaf_ddp.runtime.presence import told_after


def test_who_waits_for_long_says_what_for(caplog: pytest.LogCaptureFixture) -> None:
    with told_after(0.1, "rank 1 waits"):
        time.sleep(0.6)
    assert caplog.messages == ["gaf_ddp: rank 1 waits, for 0 s now: is the hook, or the filter, on every rank?"]


def test_who_does_not_wait_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with told_after(0.2, "rank 1 waits"):
        pass
    time.sleep(0.5)
    assert caplog.messages == []
