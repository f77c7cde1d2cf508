"""A log that is drawn again while a job writes it: what follows the file, and the view in a terminal."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gaf_ddp.monitor.log_reader import LogError, Record, read, title
from gaf_ddp.monitor.log_sentences import sentences
from gaf_ddp.monitor.table import HEAD, rows

SECONDS = 2.0  # between two looks at the file
_BARS, _LATELY = "▁▂▃▄▅▆▇█", 16  # records


def follow(path: Path, show: Callable[[list[Record]], None], pause: Callable[[], None] | None = None) -> None:
    """Show a log's records now, and whenever the file has changed, until Ctrl-C."""
    seen: object = ()
    try:
        while True:
            stamp = _stamp(path)
            if stamp != seen:
                show(read(path, growing=True))
                seen = stamp
            (pause or _pause)()
    except KeyboardInterrupt:
        return


def _pause() -> None:
    time.sleep(SECONDS)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def in_terminal(path: Path, pause: Callable[[], None] | None = None) -> None:
    """Follow a log in the terminal; LogError where rich is missing."""
    try:
        from rich.live import Live
    except ImportError as error:
        raise LogError(f"--watch needs rich: pip install 'gaf-ddp[report]' ({error})") from error
    with Live(auto_refresh=False) as live:
        follow(path, lambda records: live.update(view(path, records), refresh=True), pause)


def view(path: Path, records: Sequence[Record]) -> Any:
    """Return what the terminal shows: the sentences, and a table with how often each rank was kept lately."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    said = [Text(title(path, records), style="bold")]
    if not records:
        return Group(*said, Text("Waiting for the job's first record. Ctrl-C ends."))
    table = Table(*HEAD[:-1])
    table.add_column("kept lately", min_width=_LATELY)
    table.add_column(HEAD[-1], overflow="fold")
    for out, row in rows(records[-1]):
        bars = "".join(_bar(record["ranks"][int(row[0])]["kept"]) for record in records[-_LATELY:])
        table.add_row(*map(Text, [*row[:-1], bars, row[-1]]), style="bold red" if out else None)
    return Group(*said, *map(Text, sentences(records)), table, Text("Drawn again as the job writes. Ctrl-C ends."))


def _bar(kept: float | None) -> str:
    return " " if kept is None else _BARS[min(int(kept * len(_BARS)), len(_BARS) - 1)]
