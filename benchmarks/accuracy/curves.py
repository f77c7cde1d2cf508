"""The pictures that are curves or differences: over noise, over tau, rule minus control."""

from typing import Any

from benchmarks.accuracy.summary import Row, difference
from benchmarks.accuracy.tables import Rows, control

LINES = {
    "averaging": ("#999999", "-", "o"), "best lr": ("#555555", "--", "s"), "decay": ("#bbbbbb", "--", "v"),
    "random members": ("#e69f00", "-", "o"), "random skips": ("#d55e00", "--", "s"),
    "neighborhood": ("#0072b2", "-", "o"), "tuned": ("#56b4e9", "--", "s"), "momenta 0.7": ("#009e73", "-", "D"),
    "oracle": ("#000000", ":", ""),
}  # fmt: skip


NAMES = {
    "best lr": "averaging, best lr",
    "neighborhood": "NeighborhoodAgreement",
    "tuned": "NeighborhoodAgreement, best lr",
    "momenta 0.7": "judged by momenta, tau 0.7",
    "oracle": "oracle: clean labels",
}


def noise_lines(pyplot: Any, rows: Rows) -> Any:
    """Accuracy over noise share: a line of panels per setting, at the end and stopped early."""
    rows = [(e, found) for e, found in rows if any(row.arm == "averaging" for row in found)]
    panels = list(dict.fromkeys(e.notes["panel"] for e, _ in rows))
    size = (11, 3.6 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 2, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for line, panel in zip(axes, panels, strict=True):
        shown = [
            (100 * e.notes["share"], {row.arm: row for row in found})
            for e, found in rows
            if e.notes["panel"] == panel
        ]
        _noise_panel(line[0], shown, "final")
        _noise_panel(line[1], shown, "stopped")
        line[0].set_title(f"{panel}: at the end of training", fontsize=10)
        line[1].set_title(f"{panel}: stopped early on noisy validation data", fontsize=10)
        line[0].set_ylabel("accuracy on clean test data, %")
    for axis in axes[-1]:
        axis.set_xlabel("share of random training labels, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    for handle, label in zip(*axes[-1][0].get_legend_handles_labels(), strict=True):
        if label not in labels:
            handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _noise_panel(axis: Any, shown: list[tuple[float, dict[str, Row]]], measure: str) -> None:
    for place, (arm, (color, style, marker)) in enumerate(LINES.items()):
        points = [(share, getattr(found[arm], measure)) for share, found in shown if arm in found]
        if points:
            title = next(found[arm].title for _, found in shown if arm in found)
            axis.errorbar(
                [x + 0.5 * place - 1.5 for x, _ in points],  # side by side, so that the bars can be told apart
                [number.mean for _, number in points],
                [number.std for _, number in points],
                color=color,
                linestyle=style,
                marker=marker,
                capsize=2,
                label=NAMES.get(arm, title),
            )
    axis.grid(alpha=0.3)


def skip_lines(pyplot: Any, rows: Rows) -> Any:
    """Shares of steps skipped and of ranks kept over tau, a column per W, a line per batch size; noise dotted."""
    worlds = sorted({e.notes["world"] for e, _ in rows})
    size = (3.1 * len(worlds), 6)
    figure, axes = pyplot.subplots(2, len(worlds), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for column, world in zip(axes.T, worlds, strict=True):
        here = [(e, found) for e, found in rows if e.notes["world"] == world]
        for axis, measure in zip(column, ("skipped", "kept"), strict=True):
            _tau_panel(pyplot, axis, here, measure)
        column[0].set_title(f"W = {world}", fontsize=10)
        column[0].axhline(50, color="#b2182b", linewidth=0.8)
        column[1].set_xlabel("tau (cosine distance)")
    axes[0][0].text(0.7, 2, "red: the hook warns above half", color="#b2182b", fontsize=7)
    axes[0][0].set_ylabel("steps skipped, %")
    axes[1][0].set_ylabel("ranks in the average, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _tau_panel(pyplot: Any, axis: Any, rows: Rows, measure: str) -> None:
    for shade, batch in enumerate((8, 16, 32, 64)):
        for labels, style in (("clean", "-"), ("40 % random", ":")):
            place = {"batch": batch, "labels": labels}
            points = [
                (e.notes["tau"], getattr(found[0], measure).mean)
                for e, found in rows
                if place.items() <= e.notes.items()
            ]
            color = pyplot.get_cmap("viridis")(shade / 4)
            name = f"batch {batch}, {labels} labels"
            axis.plot(
                [x for x, _ in points], [y for _, y in points], style, marker="o", ms=4, color=color, label=name
            )
    axis.set_ylim(-3, 103)
    axis.grid(alpha=0.3)


SHOWN = 8.0  # points; gaps beyond it are written at the edge


def gaps(pyplot: Any, rows: Rows) -> Any:
    """Each candidate minus its own random controls, with two standard errors."""
    tables = [(e, {row.arm: row for row in found}) for e, found in rows]
    tried = list(dict.fromkeys(arm for _, table in tables for arm in table if control(table, arm, "members")))
    size = (4 + 3.6 * len(rows), 4.4)
    figure, axes = pyplot.subplots(1, len(rows), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, (experiment, table) in zip(axes[0], tables, strict=True):
        for place, arm in enumerate(tried):
            for shift, name, color in ((-0.15, "members", "#e69f00"), (0.15, "skips", "#0072b2")):
                _gap(axis, place + shift, table.get(arm), control(table, arm, name), color)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlim(-SHOWN, SHOWN)
        axis.set_title(experiment.title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    titles = {arm: row.title for _, table in reversed(tables) for arm, row in table.items()}
    short = [titles[arm].split(", tau")[0] if arm in ("neighborhood", "layers") else titles[arm] for arm in tried]
    axes[0][0].set_yticks(range(len(tried)), short, fontsize=9)
    axes[0][0].set_ylim(len(tried) - 0.5, -0.5)
    handles = [pyplot.Line2D([], [], marker="o", color=color) for color in ("#e69f00", "#0072b2")]
    caption = "points of final accuracy that the rule gains over the control; bars: two standard errors"
    names = ["minus random members, as many as the rule", "minus random skips, as often as the rule"]
    figure.legend(handles, names, title=caption, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _gap(axis: Any, place: float, row: Row | None, other: Row | None, color: str) -> None:
    if row is None or other is None:
        return
    mean, error = difference(row, other)
    if abs(mean) > SHOWN:
        edge = SHOWN if mean > 0 else -SHOWN
        axis.text(0.97 * edge, place, f"{mean:+.0f} ± {2 * error:.0f}", color=color, fontsize=8, va="center")
    else:
        axis.errorbar(mean, place, xerr=2 * error, fmt="o", color=color, capsize=3)
