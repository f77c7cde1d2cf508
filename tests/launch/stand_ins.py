"""Stand-ins for the programs of the machines that job files are for."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.launch.jobs import REPOSITORY, environment

LAUNCH = REPOSITORY / "launch"


@dataclass(frozen=True)
class Tools:
    """A folder of stand-in programs that comes first in the path."""

    folder: Path

    def add(self, name: str, *lines: str) -> None:
        """Make an executable bash script."""
        path = self.folder / name
        path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
        path.chmod(0o755)

    def environment(self, **values: str) -> dict[str, str]:
        """Return an environment with these tools, the repository, and the values given."""
        return environment(**{"PATH": f"{self.folder}:{os.environ['PATH']}", **values})


def stand_ins(folder: Path) -> Tools:
    """Return stand-ins for no GPUs, and for the torchrun of the interpreter that runs the tests."""
    tools = Tools(folder / "tools")
    tools.folder.mkdir()
    tools.add("torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    tools.add("nvidia-smi", "exit 9")
    return tools


def output_of(command: Sequence[object], environment: dict[str, str]) -> str:
    """Return what a command prints that ends at once."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout
