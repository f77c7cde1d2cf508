"""A log as one HTML page that needs nothing else: sentences, a table of the ranks, and the picture."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gaf_ddp.monitor.log_reader import Record, title
from gaf_ddp.monitor.log_sentences import sentences
from gaf_ddp.monitor.table import HEAD, rows

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --line: #ddd; --out: #b34e00; --fine: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e6e6e6; --line: #3a3d42; --out: #ff9b50; --fine: #6cb8e6; }
}
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.1rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap; }
th:last-child, td:last-child { text-align: left; }
.out td { color: var(--out); font-weight: bold; }
svg { width: 100%; min-width: 38rem; height: auto; margin-top: 1rem; }
"""


def write(records: Sequence[Record], log: Path, path: Path, reload: float | None = None) -> None:
    """Write the page whole, so that a browser never finds half of it; it reloads itself every so many seconds."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(html(records, log, reload))
    os.replace(unfinished, path)


def html(records: Sequence[Record], log: Path, reload: float | None = None) -> str:
    """Return the page."""
    again = "" if reload is None else f'<meta http-equiv="refresh" content="{reload:g}">'
    head = escape(title(log, records))
    said = sentences(records) if records else ["Waiting for the job's first record."]
    listed = "\n".join(f"<li>{escape(each)}</li>" for each in said)
    drawn = f"{_table(records[-1])}\n{_picture(records)}" if records else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{again}
<title>{head}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{head}</h1>
<ul>
{listed}
</ul>
{drawn}
</body>
</html>
"""


def _table(record: Record) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in HEAD)
    lines = []
    for out, row in rows(record):
        cells = "".join(f"<td>{escape(text)}</td>" for text in row)
        begin = '<tr class="out">' if out else "<tr>"
        lines.append(f"{begin}{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _picture(records: Sequence[Record]) -> str:
    from gaf_ddp.monitor.plot import inline_svg

    return f'<div class="wide">{inline_svg(records)}</div>'
