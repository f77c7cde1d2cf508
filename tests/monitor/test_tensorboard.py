"""What AgreementLog writes, as TensorBoard shows it in a real browser; skipped where there is no Chromium."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gaf_ddp import GAFState
from gaf_ddp.monitor.log import AgreementLog
from tests.monitor.browser import look_at, needs_browser, pixels_of
from tests.monitor.logged import FINE, SPOILT, take

pytestmark = pytest.mark.job
BLUE = (0, 114, 178)  # of cosine 1


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Serve the logs of a short run to this machine; return where."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    state = GAFState()
    with tensorboard.SummaryWriter(str(tmp_path / "logs")) as writer:
        log = AgreementLog(state, writer, every=5)
        for step in range(30):
            take(state, SPOILT if step % 2 else FINE)
            log.step()
    serve = ["-m", "tensorboard.main", "--logdir", str(tmp_path / "logs"), "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen([sys.executable, *serve, "--load_fast=false"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        shown = next(filter(None, (re.search(r"http://\S+", line) for line in server.stderr)))
        yield shown.group()
    finally:
        server.terminate()
        server.communicate(timeout=20)


@needs_browser
def test_shows_ranks_as_curves_and_cosines_as_a_picture(address: str, tmp_path: Path) -> None:
    page, picture = look_at(f"{address}#timeseries", tmp_path, "--virtual-time-budget=15000")
    for name in ("gaf/cosine", "gaf/kept_rank_00", "gaf/kept_rank_02"):
        assert name in page
    assert pixels_of(picture, BLUE) > 500, "the picture of the cosines is not on the page"
