"""What AgreementLog writes, as TensorBoard shows it in a real browser; skipped where there is no Chromium."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gaf_ddp import GAFState
from gaf_ddp.monitor.log import AgreementLog
from tests.monitor.logged import FINE, SPOILT, take

pytestmark = pytest.mark.job
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
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


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
def test_shows_ranks_as_curves_and_cosines_as_a_picture(address: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    screenshot = tmp_path / "tensorboard.png"
    options = ["--headless", "--disable-gpu", "--window-size=1400,1000", "--virtual-time-budget=15000"]
    options += ["--no-sandbox"] * (os.geteuid() == 0) + [f"--user-data-dir={tmp_path / 'profile'}"]
    page = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", f"--screenshot={screenshot}", f"{address}#timeseries"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    for name in ("gaf/cosine", "gaf/kept_rank_00", "gaf/kept_rank_02"):
        assert name in page
    pixels = torch.frombuffer(bytearray(image.open(screenshot).convert("RGB").tobytes()), dtype=torch.uint8)
    near = (pixels.view(-1, 3).int() - torch.tensor(BLUE)).abs().amax(1) <= 8
    assert int(near.sum()) > 500, "the picture of the cosines is not on the page"
