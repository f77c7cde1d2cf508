"""The pictures that are curves: over noise, over tau."""

from typing import Any

from benchmarks.accuracy.summary import Table, Tables

LINES = {  # name, and look
    "averaging": ("averaging", "#999999", "-", "o"),
    "best lr": ("averaging, best lr", "#555555", "--", "s"),
    "decay": ("averaging, weight decay 1e-2", "#bbbbbb", "--", "v"),
    "random members": ("random members, as many as the filter", "#e69f00", "-", "o"),
    "random skips": ("random skips, as often as the filter", "#d55e00", "--", "s"),
    "neighborhood": ("NeighborhoodAgreement", "#0072b2", "-", "o"),
    "tuned": ("NeighborhoodAgreement, best lr", "#56b4e9", "--", "s"),
    "consensus": ("consensus", "#cc79a7", "-", "^"),
    "oracle": ("oracle: clean labels", "#000000", ":", ""),
}


def noise_lines(pyplot: Any, tables: Tables) -> Any:
    """Return accuracy over noise share: a line of panels per setting, at the end and stopped early."""
    panels = list(dict.fromkeys(e.notes["panel"] for e, _ in tables))
    size = (11, 3.6 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 2, figsize=size, layout="constrained", sharey=True, squeeze=False)
    legend: dict[str, Any] = {}
    for line, panel in zip(axes, panels, strict=True):
        shown = [(100 * e.notes["share"], table) for e, table in tables if e.notes["panel"] == panel]
        _noise_panel(line[0], shown, "final")
        _noise_panel(line[1], shown, "stopped")
        line[0].set_title(f"{panel}: at the end of training", fontsize=10)
        line[1].set_title(f"{panel}: stopped early on noisy validation data", fontsize=10)
        line[0].set_ylabel("accuracy on clean test data, %")
        handles, names = line[0].get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))
    for axis in axes[-1]:
        axis.set_xlabel("share of random training labels, %")
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 9}
    figure.legend(legend.values(), legend.keys(), **place)
    return figure


def _noise_panel(axis: Any, shown: list[tuple[float, Table]], measure: str) -> None:
    for place, (arm, (name, color, style, marker)) in enumerate(LINES.items()):
        points = [(share, getattr(table[arm], measure)) for share, table in shown if arm in table]
        if points:
            axis.errorbar(
                [x + 0.5 * place - 1.5 for x, _ in points],  # side by side, so that the bars can be told apart
                [number.mean for _, number in points],
                [number.std for _, number in points],
                color=color,
                linestyle=style,
                marker=marker,
                capsize=2,
                label=name,
            )
    axis.grid(alpha=0.3)


def skip_lines(pyplot: Any, tables: Tables) -> Any:
    """Return shares of steps skipped and ranks kept over tau: a column per W, a line per batch; noise dotted."""
    worlds = sorted({e.notes["world"] for e, _ in tables})
    size = (3.1 * len(worlds), 6)
    figure, axes = pyplot.subplots(2, len(worlds), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for column, world in zip(axes.T, worlds, strict=True):
        here = [(e, table) for e, table in tables if e.notes["world"] == world]
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


def _tau_panel(pyplot: Any, axis: Any, tables: Tables, measure: str) -> None:
    for shade, batch in enumerate((8, 16, 32, 64)):
        for labels, style in (("clean", "-"), ("40 % random", ":")):
            place = {"batch": batch, "labels": labels}
            found = [(e.notes["tau"], t["neighborhood"]) for e, t in tables if place.items() <= e.notes.items()]
            taus, shares = [tau for tau, _ in found], [getattr(row, measure).mean for _, row in found]
            color = pyplot.get_cmap("viridis")(shade / 4)
            name = f"batch {batch}, {labels} labels"
            axis.plot(taus, shares, style, marker="o", ms=4, color=color, label=name)
    axis.set_ylim(-3, 103)
    axis.grid(alpha=0.3)
