"""README's commands are real: two in the quick start, files it links to, and code that runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_quick_start_has_exactly_two_commands() -> None:
    quick_start = README.split("## Quick start")[1].split("\n## ")[0]
    install, test = re.findall(r"```bash\n(.*?)```", quick_start, flags=re.S)
    assert "-m launch.train" in install
    assert test.endswith("-m pytest -n 2\n")
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for command in (install, test))
    assert "```bash" not in README.replace(quick_start, "")


def test_every_link_into_the_repository_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
