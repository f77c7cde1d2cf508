"""The picture of a log: how often each rank was kept, and how far it was from the consensus, over the steps."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from gaf_ddp.monitor.absences import absences
from gaf_ddp.monitor.log_reader import Record, edges, name

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_FINE, _OUT, _LINE = "#0072B2", "#D55E00", "#e6e6e6"
_KEPT = LinearSegmentedColormap.from_list("kept", [_OUT, "#f3f3f3", "#9fc8e3"])
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
}
# Within a page, ink and paper are the page's own; until then they are these, which nothing else is.
_INK, _PAPER = "#010203", "#fcfdfe"
_OF_PAGE = {_INK: "currentColor", _PAPER: "var(--page)", _OUT: "var(--out)", _FINE: "var(--fine)"}
_OF_PAGE[_LINE] = "var(--line)"
_WITHIN_PAGE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), _PAPER),
    "svg.hashsalt": "gaf_ddp",
}
_ABOUT = "How often each rank was kept, and its distance to the consensus, over the training steps"
_ALL_NAMED = 16  # ranks; of more only some, and those that are out


def draw(records: Sequence[Record], path: Path) -> None:
    """Write the picture of a log's records."""
    with mpl.rc_context(_STYLE):
        figure(records).savefig(path, dpi=150)


def inline_svg(records: Sequence[Record]) -> str:
    """Return the picture as SVG to put into a page, in the page's colours."""
    file = io.StringIO()
    with mpl.rc_context(_STYLE | _WITHIN_PAGE):
        figure(records).savefig(file, format="svg", dpi=150, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, of_page in _OF_PAGE.items():
        svg = svg.replace(colour.lower(), of_page)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_ABOUT}" ', 1)


def figure(records: Sequence[Record]) -> Figure:
    """Return the picture: a row per rank above, a line per rank below where distances are known."""
    size = len(records[-1]["ranks"])
    distances = any(rank["distance"] is not None for record in records for rank in record["ranks"])
    rows = min(4.0, max(1.2, 0.3 * size))
    drawn = Figure(figsize=(9, 1.5 + rows + 3.0 * distances), layout="constrained")
    heights = [rows, 3.0] if distances else [rows]
    axes = drawn.subplots(len(heights), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    out = [absence.rank for absence in absences(records) if absence.until is None]
    drawn.suptitle(_headline(records, out), x=0.012, ha="left", fontsize=14, fontweight="bold")
    _draw_kept(axes[0], records, out)
    if distances:
        _draw_distances(axes[1], records, out)
    axes[-1].set_xlabel("training step")
    axes[-1].set_xlim(edges(records)[0], edges(records)[-1])
    return drawn


def _headline(records: Sequence[Record], out: list[int]) -> str:
    count = len(records[-1]["ranks"])
    if not out:
        return f"No rank of {count} is out at step {records[-1]['step']}"
    watched = records[-1].get("watch")
    if len(out) > 1:
        are = "would be left out" if watched else "are out"
        return f"{len(out)} ranks of {count} {are}: {', '.join(map(str, out[:8]))}{' …' * (len(out) > 8)}"
    since = next(absence.since for absence in absences(records) if absence.until is None)
    host = records[-1]["ranks"][out[0]]["host"]
    is_out = "would be left out" if watched else "is out"
    return f"Rank {out[0]} of {count}{f', on {host},' if host else ''} {is_out} since step {since}"


def _draw_kept(axis: Axes, records: Sequence[Record], out: list[int]) -> None:
    """Draw a row per rank, coloured by how often it was kept."""
    size = len(records[-1]["ranks"])
    kept = [[record["ranks"][rank]["kept"] for record in records] for rank in range(size)]
    shares = [[float("nan") if share is None else 100 * share for share in row] for row in kept]
    borders = [rank - 0.5 for rank in range(size + 1)]
    mesh = axis.pcolormesh(edges(records), borders, shares, cmap=_KEPT, vmin=0, vmax=100, rasterized=True)
    first, *_, last = edges(records)
    paper = mpl.rcParams["axes.facecolor"]
    axis.hlines(borders[1:-1], first, last, color=paper, linewidth=2 if size <= _ALL_NAMED else 0.5)
    axis.invert_yaxis()
    named = [rank for rank in range(size) if rank in out or rank % -(-size // _ALL_NAMED) == 0]
    axis.set_yticks(named, [name(records[-1], rank) for rank in named])
    for rank, label in zip(named, axis.get_yticklabels(), strict=True):
        if rank in out:
            label.set(color=_OUT, fontweight="bold")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("How often each rank was kept")
    bar = axis.figure.colorbar(mesh, ax=axis, ticks=[0, 50, 100], pad=0.01, aspect=12)
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)


def _draw_distances(axis: Axes, records: Sequence[Record], out: list[int]) -> None:
    """Draw each rank's distance over the steps, on a logarithmic scale, and the limit."""
    steps = [record["step"] for record in records]
    for rank in sorted(range(len(records[-1]["ranks"])), key=lambda rank: rank in out):
        z = [record["ranks"][rank]["distance"] for record in records]
        values = [float("nan") if value is None else max(value, 0.1) for value in z]
        bad = rank in out
        axis.plot(steps, values, color=_OUT if bad else _FINE, linewidth=2.4 if bad else 1.4, alpha=1 if bad else 0.6)
        if bad and len(out) <= 4 and values[-1] == values[-1]:
            place: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (6, 0),
                "va": "center",
                "annotation_clip": False,
            }
            label = axis.annotate(f"rank {rank}", (steps[-1], values[-1]), color=_OUT, fontweight="bold", **place)
            label.set_in_layout(False)  # beside the colours' bar there is room
    ratio = records[-1]["ratio"]
    if ratio:
        axis.axhline(ratio, color=mpl.rcParams["text.color"], linewidth=1, linestyle=(0, (4, 3)))
        note: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 9.5}
        axis.annotate(f"left out above {ratio:g}", (edges(records)[0], ratio), **note)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.5), max(high, 10))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_title("Distance z to the consensus, in its members' median distance")
    axis.set_ylabel("z (logarithmic)")
    axis.grid(axis="y", color=_LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
