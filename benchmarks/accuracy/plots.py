"""The pictures: one for each group that has finished runs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.accuracy.arms import ARMS, title_of
from benchmarks.accuracy.curves import noise_lines, skip_lines
from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.summary import Table, Tables

KINDS = {  # what an arm's kind means, and its colour
    "filter": ("agreement filter", "#0072b2"),
    "averaging": ("averaging", "#999999"),
    "control": ("random control", "#e69f00"),
    "other rule": ("other robust rule", "#009e73"),
}


MOST_PANELS, LEAST_BARS = 4, 6  # in a line; that a panel has room for


def draw(group: str, question: str, tables: Tables, path: Path) -> None:
    """Draw a group's picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure = PICTURES.get(group, _bars)(pyplot, tables)
    figure.suptitle(question, fontweight="bold")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _bars(pyplot: Any, tables: Tables) -> Any:
    """Return a panel per experiment, a bar per arm; the oracle is a line."""
    arms = [arm for arm in ARMS if arm != "oracle" and any(arm in table for _, table in tables)]
    columns = min(len(tables), MOST_PANELS)
    rows = -(-len(tables) // columns)
    size = (3.1 + 2.5 * columns, 0.9 + 0.27 * max(len(arms), LEAST_BARS) * rows)
    grid = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(rows, columns, figsize=size, **grid)
    highest = max(row.final.mean for _, table in tables for row in table.values())
    end = min(10 * math.ceil(0.13 * highest), 100)
    for axis, (experiment, table) in zip(axes.flat, tables, strict=False):
        _bar_panel(axis, experiment, table, arms, end)
    for axis in axes.flat[len(tables) :]:
        axis.set_axis_off()
    axes[0][0].set_yticks(range(len(arms)), [title_of(tables[0][0], arm) for arm in arms], fontsize=8)
    shown = dict.fromkeys(row.kind for _, table in tables for row in table.values() if row.kind != "oracle")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=KINDS[kind][1]) for kind in shown]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--"))
    names = [*(KINDS[kind][0] for kind in shown), "oracle: no bad ranks or labels"]
    caption = "final accuracy on clean test data, %: mean, and standard deviation over seeds"
    figure.legend(handles, names, title=caption, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _bar_panel(axis: Any, experiment: Experiment, table: Table, arms: Sequence[str], end: float) -> None:
    gap = end / 50
    for place, arm in enumerate(arms):
        if arm not in table:
            axis.text(gap, place, "-", va="center", fontsize=8, color="#777777")
            continue
        final, color = table[arm].final, KINDS[table[arm].kind][1]
        axis.barh(place, final.mean, xerr=final.std, color=color, error_kw={"elinewidth": 1})
        at, ink = (gap, "white") if final.mean > 10 * gap else (final.mean + final.std + gap, "black")
        axis.text(at, place, f"{final.mean:.1f}", va="center", fontsize=8, color=ink, fontweight="bold")
    if "oracle" in table:
        axis.axvline(table["oracle"].final.mean, color="black", linestyle="--", linewidth=1)
    axis.set_title(fill(experiment.notes.get("panel", experiment.title), 36), fontsize=9)
    axis.set_xlim(0, end)
    axis.tick_params(labelsize=8)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)


SHADES = [(0.0, "#b2182b"), (0.6, "#ef8a62"), (0.88, "#fddbc7"), (0.95, "#f7f7f7"), (1.0, "#d1e5f0")]
COLUMNS = {
    "averaging": "averaging",
    "guard only": "averaging\nbehind the\nnorm guard",
    "krum": "Krum",
    "upgrad": "UPGrad",
    "sequential": "Sequential\n(paper)\ntau 0.95",
    "default": "Neighbor-\nhood\ntau 1",
    "neighborhood": "Neighbor-\nhood\ntau 0.95",
    "consensus": "consensus\nGAFState()",
    "oracle": "without\nthe rank",
}


def _heatmap(pyplot: Any, tables: Tables) -> Any:
    """Return faults down, arms across, final accuracy in the cells; the bad rank first, then last."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("", SHADES)
    colors.set_bad("#eeeeee")
    figure, axes = pyplot.subplots(1, 2, figsize=(15.5, 5.4), layout="constrained", sharey=True)
    for axis, rank, place in zip(axes, (0, 7), ("first", "last"), strict=True):
        shown = {e.notes["fault"]: table for e, table in tables if e.notes["rank"] == rank}
        columns = [arm for arm in COLUMNS if any(arm in table for table in shown.values())]
        shown.pop("none", None)
        finals = [[t[arm].final.mean if arm in t else math.nan for arm in columns] for t in shown.values()]
        if not finals:
            axis.set_axis_off()
            continue
        axis.imshow(finals, cmap=colors, vmin=10, vmax=100, aspect="auto")
        for y, line in enumerate(finals):
            for x, value in enumerate(line):
                text = "-" if math.isnan(value) else f"{value:.1f}"
                color = "white" if value < 40 else "black"
                axis.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
        axis.set_xticks(range(len(columns)), [COLUMNS[arm] for arm in columns], fontsize=8)
        axis.tick_params(length=0)
        axis.set_yticks(range(len(shown)), list(shown))
        axis.set_title(f"broken rank is the {place} of 8", fontsize=10)
    figure.supxlabel("\nfinal accuracy on clean test data, %; dark red: training is destroyed", fontsize=9)
    return figure


PICTURES: dict[str, Callable[[Any, Tables], Any]] = {"broken": _heatmap, "uniform": noise_lines, "tau": skip_lines}
