"""What the command lines share: help that explains the columns, and arguments refused before measuring."""

import argparse
from pathlib import Path

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def described(text: str | None) -> argparse.ArgumentParser:
    """Return a command line whose --help is a module's docstring, which says what the columns mean."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """Return a whole number from 1, as a type of arguments."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, found {text!r}")
    return int(text)


def size_in_bytes(text: str) -> int:
    """Return the bytes of a size as nccl-tests takes it: 8, 64K, 25M, 1G."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in _UNITS or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"a size must be a positive number, then K, M, G or nothing, found {text!r}")
    return int(number) * _UNITS[unit]


def new_folder(text: str) -> Path:
    """Return the path of a folder that there is, or now is, as a type of arguments."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a folder, or one that can be made, found {text!r}") from error
    return path


def new_file(text: str) -> Path:
    """Return the path of a file that can be written, as a type of arguments: hours of measuring end there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, found the folder {text!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be made, found {text!r}") from error
    return path
