"""A real browser without a window, for tests of what people see; Chromium, where it is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


def look_at(address: str, folder: Path, *options: str, size: tuple[int, int] = (1400, 1000)) -> tuple[str, Path]:
    """Return a page's content as the browser has it in the end, and where its picture is."""
    picture = folder / "picture.png"
    always = [
        "--headless",
        "--disable-gpu",
        f"--window-size={size[0]},{size[1]}",
        f"--user-data-dir={folder / 'profile'}",
    ]
    always += ["--no-sandbox"] * (os.geteuid() == 0)
    page = subprocess.run(
        [str(BROWSER), *always, *options, "--dump-dom", f"--screenshot={picture}", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return page.stdout, picture


def pixels_of(picture: Path, colour: tuple[int, int, int]) -> int:
    """Return how many pixels have nearly that colour."""
    image = pytest.importorskip("PIL.Image")
    pixels = torch.frombuffer(bytearray(image.open(picture).convert("RGB").tobytes()), dtype=torch.uint8)
    return int(((pixels.view(-1, 3).int() - torch.tensor(colour)).abs().amax(1) <= 8).sum())
