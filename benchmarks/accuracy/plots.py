"""The pictures: one for each group that has finished runs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.arms import ARMS, title_of
from benchmarks.accuracy.curves import gaps, noise_lines, skip_lines
from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.summary import Row, rows_of
from benchmarks.accuracy.tables import Rows

COLORS = {
    "filter": "#0072b2", "averaging": "#999999", "control": "#e69f00", "other rule": "#009e73", "oracle": "#000",
}  # fmt: skip
MEANINGS = {
    "filter": "agreement filter", "averaging": "averaging", "control": "random control",
    "other rule": "other robust rule", "oracle": "oracle",
}  # fmt: skip


def draw(group: str, question: str, experiments: Sequence[Experiment], store: Store, path: Path) -> bool:
    """Draw a group's picture; return whether there was anything to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [(e, found) for e in experiments if (found := rows_of(e, store))]
    if not rows:
        return False
    figure = PICTURES.get(group, _bars)(pyplot, rows)
    figure.suptitle(question, fontweight="bold")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return True


def _bars(pyplot: Any, rows: Rows) -> Any:
    """A panel per experiment, a bar per arm; the oracle is a line."""
    height = 0.9 + 0.27 * max(len(found) for _, found in rows)
    figure, axes = pyplot.subplots(
        1,
        len(rows),
        figsize=(3.1 + 2.5 * len(rows), height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    arms = [arm for arm in ARMS if arm != "oracle" and any(row.arm == arm for _, found in rows for row in found)]
    for axis, (experiment, found) in zip(axes[0], rows, strict=True):
        _bar_panel(axis, experiment, found, arms)
    axes[0][0].set_yticks(range(len(arms)), [title_of(rows[0][0], arm) for arm in arms], fontsize=8)
    shown = dict.fromkeys(row.kind for _, found in rows for row in found if row.kind != "oracle")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[kind]) for kind in shown]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--"))
    names = [*(MEANINGS[kind] for kind in shown), "oracle: no bad ranks or labels"]
    caption = "final accuracy on clean test data, %: mean, and standard deviation over seeds"
    figure.legend(handles, names, title=caption, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _bar_panel(axis: Any, experiment: Experiment, found: Sequence[Row], arms: Sequence[str]) -> None:
    names = {arm: place for place, arm in enumerate(arms)}
    for row in found:
        if row.kind == "oracle":
            axis.axvline(row.final.mean, color="black", linestyle="--", linewidth=1)
            continue
        place = names[row.arm]
        axis.barh(place, row.final.mean, xerr=row.final.std, color=COLORS[row.kind], error_kw={"elinewidth": 1})
        inside = row.final.mean > 20
        at, color = (2, "white") if inside else (row.final.mean + row.final.std + 2, "black")
        axis.text(at, place, f"{row.final.mean:.1f}", va="center", fontsize=8, color=color, fontweight="bold")
    for arm in names.keys() - {row.arm for row in found}:
        axis.text(2, names[arm], "-", va="center", fontsize=8, color="#777777")
    axis.set_title(experiment.notes.get("panel", experiment.title), fontsize=9)
    axis.set_xlim(0, 100)
    axis.tick_params(labelsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)


SHADES = [(0.0, "#b2182b"), (0.6, "#ef8a62"), (0.88, "#fddbc7"), (0.95, "#f7f7f7"), (1.0, "#d1e5f0")]
SHORT = {
    "averaging": "averaging",
    "guard only": "averaging\nbehind the\nnorm guard",
    "krum": "Krum",
    "upgrad": "UPGrad",
    "sequential": "Sequential\n(paper)\ntau 0.95",
    "default": "Neighbor-\nhood\ntau 1",
    "neighborhood": "Neighbor-\nhood\ntau 0.95",
    "momenta 0.7": "by momenta\n0.9, tau 0.7",
    "oracle": "without\nthe rank",
}


def _heatmap(pyplot: Any, rows: Rows) -> Any:
    """Faults down, arms across, final accuracy in the cells; the bad rank first, then last."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("", SHADES)
    colors.set_bad("#eeeeee")
    arms = ("averaging", "guard only", "krum", "upgrad", "sequential", "default", "neighborhood", "momenta 0.7",
            "oracle")  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 5.4), layout="constrained", sharey=True)
    for axis, rank, place in zip(axes, (0, 7), ("first", "last"), strict=True):
        shown = [(e, {row.arm: row for row in found}) for e, found in rows if e.notes["rank"] == rank]
        faults = [e.notes["fault"] for e, _ in shown if e.notes["fault"] != "none"]
        columns = [arm for arm in arms if any(arm in found for _, found in shown)]
        cells = {e.notes["fault"]: found for e, found in shown}
        table = [[cells[f][arm].final.mean if arm in cells[f] else math.nan for arm in columns] for f in faults]
        axis.imshow(table, cmap=colors, vmin=10, vmax=100, aspect="auto")
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                text = "-" if math.isnan(value) else f"{value:.1f}"
                color = "white" if value < 40 else "black"
                axis.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
        axis.set_xticks(range(len(columns)), [SHORT[arm] for arm in columns], fontsize=8)
        axis.tick_params(length=0)
        axis.set_yticks(range(len(faults)), faults)
        axis.set_title(f"broken rank is the {place} of 8", fontsize=10)
    figure.supxlabel("\nfinal accuracy on clean test data, %; dark red: training is destroyed", fontsize=9)
    return figure


PICTURES: dict[str, Callable[[Any, Rows], Any]] = {
    "broken": _heatmap, "uniform": noise_lines, "tau": skip_lines, "candidates": gaps,
}  # fmt: skip
