"""Tell what a log of AgreementLog says: who is out, since when, on which host, why; draw it; watch it grow.

python -m gaf_ddp.report agreement.jsonl --out agreement.png
python -m gaf_ddp.report agreement.jsonl --watch
python -m gaf_ddp.report agreement.jsonl --watch --out agreement.html
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gaf_ddp.monitor import live, page
from gaf_ddp.monitor.log_reader import LogError, Record, read, title
from gaf_ddp.monitor.log_sentences import sentences

_KINDS = (".html", ".png", ".svg", ".pdf")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the sentences, and draw the picture if asked to; once, or as long as the log grows."""
    parser = argparse.ArgumentParser(
        prog="python -m gaf_ddp.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, metavar="LOG", help="a file that AgreementLog wrote")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="a page or a picture to write: .html, .png, .svg or .pdf"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="draw again whenever the log has grown, until Ctrl-C: in the terminal, or the file of --out",
    )
    found = parser.parse_args(arguments)
    try:
        _check(found.out)
        (_watch if found.watch else _tell)(found.log, found.out)
    except LogError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _tell(log: Path, out: Path | None) -> None:
    records = read(log)
    print("\n".join([title(log, records), *sentences(records)]))
    if out:
        _draw(records, log, out)
        print(out)


def _watch(log: Path, out: Path | None) -> None:
    if out is not None:
        print(f"{out} is written again whenever {log} has grown; Ctrl-C ends.", flush=True)
        live.follow(log, lambda records: _draw(records, log, out, live.SECONDS))
    elif sys.stdout.isatty():
        live.in_terminal(log)
    else:
        raise LogError("--watch must write to a terminal, found a file or a pipe; or give --out page.html")


def _check(out: Path | None) -> None:
    """Refuse what cannot be written before a long log is read."""
    if out is None:
        return
    if out.suffix not in _KINDS or not out.parent.is_dir():
        raise LogError(f"--out must end in .html, .png, .svg or .pdf, in an existing folder, found {out}")


def _draw(records: Sequence[Record], log: Path, out: Path, reload: float | None = None) -> None:
    try:
        from gaf_ddp.monitor import plot
    except ImportError as error:
        raise LogError(f"--out needs matplotlib: pip install 'gaf-ddp[report]' ({error})") from error
    if out.suffix == ".html":
        page.write(records, log, out, reload)
    elif records:
        plot.draw(records, out)
