"""The text experiments learn: what Python says of itself, in two registers, cut into windows of characters.

Register 0 is the documentation strings of the standard library's modules, register 1 the language reference behind
`help()`. Both come with Python, so another version of it has other text.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

CONTEXT = 64  # characters that a window shows; each is to be followed by the next
TRAIN, TEST = 4000, 250  # windows of each register, none of which overlap
LETTERS = "\n" + "".join(map(chr, range(32, 127)))  # others are left out
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def windows(register: int) -> Tensor:
    """Return `(TRAIN + TEST, CONTEXT + 1)` indices into LETTERS, evenly over all that the register holds."""
    place = {letter: i for i, letter in enumerate(LETTERS)}
    text = "\n".join(_documentation() if register == 0 else _reference())
    letters = torch.tensor([place[letter] for letter in text if letter in place])
    starts = torch.linspace(0, len(letters) - CONTEXT - 1, TRAIN + TEST).long()
    return letters[starts[:, None] + torch.arange(CONTEXT + 1)]


def hardest_quarter(windows: Tensor) -> Tensor:
    """Return which windows surprise most by what follows each of their letters, bool `(n,)`."""
    pairs = windows[:, :-1] * len(LETTERS) + windows[:, 1:]
    seen = pairs.flatten().bincount(minlength=len(LETTERS) ** 2).view(len(LETTERS), -1)
    surprise = -(seen / seen.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-30).log().flatten()[pairs].mean(1)
    return surprise > surprise.quantile(0.75)


def _documentation() -> Iterator[str]:
    """Yield the documentation strings of modules, classes and functions, in the order of files and lines."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
