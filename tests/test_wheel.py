"""The wheel stands alone: built, checked, installed where there is nothing but torch, README's script runs on it."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import gaf_ddp
from tests.launch.jobs import REPOSITORY, environment

pytestmark = pytest.mark.job
README = (REPOSITORY / "README.md").read_text()

# Added to README's script.
ALONE = """
for name in ("numpy", "launch", "tests", "matplotlib"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} can be imported: this environment is not empty")
"""


def run(*command: object, folder: Path) -> str:
    """Return what the command printed; it must end well."""
    ended = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist, and the wheel that was made from it."""
    for needed in ("build", "hatchling", "hatch_fancy_pypi_readme", "twine"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY, folder=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with torch, what torch asks for, and the wheel."""
    home = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    for source in torch_and_what_it_needs():
        if not (packages / source.name).exists():
            (packages / source.name).symlink_to(source)
    (wheel,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-index", "--no-deps", "--target", packages, wheel, folder=home)
    return home / "bin" / "python"


def torch_and_what_it_needs() -> set[Path]:
    """Return what lies in site-packages of torch and, over and over, of its requirements with their extras."""
    found: set[Path] = set()
    seen: set[str] = set()
    wanted = [Requirement("torch")]
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # of another operating system or Python
        parts = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
        found |= {Path(str(package.locate_file(part))) for part in parts}
        for further in map(Requirement, package.requires or []):
            extras = ("", *requirement.extras)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(further)
    return found


def metadata(built: Path) -> Message:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        return message_from_bytes(archive.read(name))


def test_is_what_an_index_takes(built: Path) -> None:
    archives = sorted(built.iterdir())
    assert [archive.name.split("-")[0] for archive in archives] == ["gaf_ddp", "gaf_ddp"]
    run(sys.executable, "-m", "twine", "check", "--strict", *archives, folder=built)


def test_holds_the_package_alone_and_is_small(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "gaf_ddp").rglob("*.py")}
    modules |= {"gaf_ddp/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if "dist-info" not in name} == modules
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    around = {"README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "LICENSE", "pyproject.toml", "PKG-INFO"}
    assert files == modules | around | {".gitignore"}
    assert sdist.stat().st_size < 150_000


def test_metadata_say_what_it_is(built: Path) -> None:
    found = metadata(built)
    assert found["Version"] == gaf_ddp.__version__
    assert found["Author"] == "The gaf_ddp authors"
    assert found["License-Expression"] == "MIT"
    assert "Paper, https://arxiv.org/abs/2412.18052" in (found.get_all("Project-URL") or [])
    required = [each for each in found.get_all("Requires-Dist") or [] if "extra ==" not in each]
    assert required == ["torch>=2.11"]


def test_the_index_shows_readme_without_links_that_lead_nowhere(built: Path) -> None:
    shown = metadata(built).get_payload(decode=True)
    assert isinstance(shown, bytes)
    text = shown.decode()
    assert re.findall(r"\]\((?!https?:)[^)]*\)", text) == []
    assert "](https://arxiv.org/abs/2412.18052)" in text
    assert re.findall(r"^#.*", text, flags=re.M) == re.findall(r"^#.*", README, flags=re.M)
    for words in re.findall(r"(?<!!)\[([^\]]*)\]\((?!https?:)[^)]*\)", README):
        assert words in text


def test_readme_s_script_runs_on_the_wheel(installed: Path, tmp_path: Path) -> None:
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, flags=re.S) if "# train.py" in block)
    (tmp_path / "train.py").write_text(block + ALONE)
    torchrun = (installed, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4)
    assert "  rank 1 on " in run(*torchrun, "train.py", folder=tmp_path)


def test_demo_and_report_run_on_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, "-I", "-m", "gaf_ddp.demo", "--ranks", 3, "--steps", 6, folder=tmp_path)
    assert "GAFState()" in shown
    shown = run(installed, "-I", "-m", "gaf_ddp.report", "agreement.jsonl", folder=tmp_path)
    assert "3 ranks, to step 6, 6 records" in shown


def test_citation_names_paper_and_software() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format asks for
    assert cited["version"] == gaf_ddp.__version__
    paper = cited["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Chaubard", "Eddy", "Kochenderfer"]
    assert paper["url"] in README
