"""The documentation's Python is real: its blocks run on four ranks, and print what the page says.

A block that is not run says so in its title, `title="not run: …"`, which the page shows. A block titled `NAME.py` is a
whole script, and runs on each rank as under torchrun. What follows a block, titled `prints`, is what rank 0 prints;
numbers and the machine's name may differ.
"""

import contextlib
import io
import os
import re
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gaf_ddp

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
RANKS = 4


class Block(NamedTuple):
    """A block of Python on a page, and what it should print."""

    where: str
    title: str
    code: str
    prints: str | None


def blocks() -> list[Block]:
    found: list[Block] = []
    fence = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.M | re.S)
    for page in PAGES:
        text = page.read_text()
        for match in fence.finditer(text):
            indent, language, options, body = match.groups()
            body = re.sub(f"^{indent}", "", body, flags=re.M)
            title = re.search(r'title="([^"]*)"', options)
            name = title.group(1) if title else ""
            if language == "python":
                line = text[: match.start()].count("\n") + 1
                found.append(Block(f"{page.name}:{line}", name, body, None))
            elif name == "prints":
                found[-1] = found[-1]._replace(prints=body)
    return found


BLOCKS = blocks()
SHORT = [block for block in BLOCKS if not block.title]
SCRIPTS = [block for block in BLOCKS if re.fullmatch(r"\w+\.py", block.title)]


def scene(rank: int, code: str) -> dict[str, Any]:
    """Return what a short block finds: a model, its optimizer and data; with wrong labels on rank 1."""
    torch.manual_seed(0)
    rule = torch.randn(20, 4)
    held_out = torch.randn(32, 20)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)))
    draws = torch.Generator().manual_seed(rank + 1)
    loader = []
    for _ in range(40):
        inputs = torch.randn(16, 20, generator=draws)
        loader.append((inputs, ((inputs @ rule).argmax(1) + (rank == 1)) % 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    found = {
        "torch": torch,
        "dist": dist,
        "nn": nn,
        "DistributedDataParallel": DistributedDataParallel,
        "network": network,
        "model": model,
        "optimizer": optimizer,
        "criterion": criterion,
        "loader": loader,
        "inputs": loader[0][0],
        "targets": loader[0][1],
        "held_out_inputs": held_out,
        "held_out_targets": (held_out @ rule).argmax(1),
        **{name: getattr(gaf_ddp, name) for name in gaf_ddp.__all__},
    }
    if re.search(r"\bstate\b", code) and not re.search(r"\bstate :?= ", code):
        found["state"] = state = gaf_ddp.attach(model)
        for inputs, targets in loader[:8]:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
        assert state.step == 8
    return found


def run_blocks(device: torch.device, folder: str, ports: list[int]) -> list[str]:
    """Run all blocks on this rank, the scripts last, as torchrun would; return what each printed."""
    os.chdir(folder)
    rank = dist.get_rank()
    printed = [run(block, scene(rank, block.code)) for block in SHORT]
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    for block, port in zip(SCRIPTS, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        printed.append(run(block, {"__name__": "__main__"}))
    return printed


def run(block: Block, names: dict[str, Any]) -> str:
    """Run a block with these names; return what it printed, once all ranks are done."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(block.code, block.where, "exec"), names)
    except Exception:
        raise AssertionError(f"{block.where}\n{traceback.format_exc()}") from None
    if dist.is_initialized():
        dist.barrier()
    return out.getvalue()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def alike(text: str) -> str:
    """Return a text without what differs from machine to machine."""
    text = re.sub(r"(rank \d+) on \S+?(?=[:\s,])", r"\1 on HOST", text)
    text = re.sub(r"(?<![\w.])[+-]?\d+(\.\d+)?(e[+-]\d+)?", "#", text)
    return re.sub(r" +", " ", text).strip()


@pytest.mark.job
def test_blocks_run_and_print_what_the_page_says(gloo_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert SHORT
    assert SCRIPTS
    printed = gloo_ranks(RANKS, run_blocks, str(tmp_path), [free_port() for _ in SCRIPTS], timeout=150)[0]
    both = list(zip(SHORT + SCRIPTS, printed, strict=True))
    wrong = [f"{b.where} printed\n{out}" for b, out in both if b.prints is not None and alike(out) != alike(b.prints)]
    assert not wrong, "\n".join(wrong)


def test_what_is_not_run_says_so() -> None:
    for block in BLOCKS:
        assert block in SHORT + SCRIPTS or block.title.startswith("not run: "), block.where
        compile(block.code, block.where, "exec")


def test_every_public_name_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    shown = set(
        re.findall(r"^::: gaf_ddp\.(?:attach\.)?(\w+)$", page, flags=re.M)
    )  # a module has the name of its function
    assert sorted(gaf_ddp.__all__) == sorted(shown & set(gaf_ddp.__all__))
    listed = re.search(r"^::: gaf_ddp\.GAFState\n.*?^ +members:\n(.*?)^\n", page, flags=re.M | re.S)
    assert listed is not None
    members = [name for name in dir(gaf_ddp.GAFState) if not name.startswith("_")]
    assert sorted(re.findall(r"- (\w+)", listed.group(1))) == sorted(members)


def test_every_page_is_in_the_navigation() -> None:
    linked = re.findall(r'= "(\w+\.md)" }', (ROOT / "zensical.toml").read_text())
    assert sorted(linked) == [page.name for page in PAGES]
