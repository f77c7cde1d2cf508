"""One picture of a job: the accuracy of every method, and which ranks the filters kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from launch.methods import NAMES
from launch.records import Record, Result, results, spread
from launch.settings import Plan

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"average": "#666666", "tau": "#0072B2", "consensus": "#009E73", "paper": "#CC79A7"}
DASHES = {"average": ":", "tau": "--", "consensus": "-", "paper": "-."}  # as a line is told apart in grey, too
WRONG = "#D55E00"
STYLE: dict[Any, Any] = {"font.size": 11, "font.family": "DejaVu Sans", "axes.titlesize": 12, "axes.titlepad": 14}
BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
ALL_LABELLED, TWO_LINES = 12, 6  # up to so many ranks every bar has a name, and room for two lines


def draw(records: Sequence[Record], plan: Plan, path: Path) -> None:
    """Write the picture of all runs in `records`."""
    with matplotlib.rc_context(STYLE):
        _figure(records, plan).savefig(path, dpi=150)


def _figure(records: Sequence[Record], plan: Plan) -> Figure:
    outcome = results(records)
    filters = [method for method in outcome if method != "average"]
    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.05)
    figure = Figure(figsize=(6.2 + 2.7 * len(filters), 4.7), layout=spacing, facecolor="white")
    axes = figure.subplots(1, 1 + len(filters), squeeze=False, width_ratios=[1.7, *[1] * len(filters)])[0]
    figure.suptitle(_headline(plan), x=0.012, ha="left", fontsize=15, fontweight="bold")
    figure.supxlabel(_caption(plan), x=0.012, ha="left", fontsize=9.5, color="#555555")
    _draw_accuracy(axes[0], records, plan)
    for axis, method in zip(axes[1:], filters, strict=True):
        _draw_kept(axis, outcome[method], plan)
    return figure


def _headline(plan: Plan) -> str:
    noise = f"{100 * plan.label_noise:.0f} % of all training labels are wrong" if plan.label_noise else ""
    wrong = ", ".join(map(str, plan.corrupt_ranks))
    several = len(plan.corrupt_ranks) > 1
    shifted = f"Rank{'s' * several} {wrong} of {plan.world} learn{'s' * (not several)} from wrong labels"
    return "; ".join(part for part in (shifted if wrong else "", noise) if part) or f"{plan.world} ranks"


def _caption(plan: Plan) -> str:
    job = f"{plan.data}, {plan.model}, {plan.batch_size} examples per rank and step, tau {plan.tau:g}"
    seeds = f"mean of {plan.seeds} seeds, band: ± 1 standard deviation; " if plan.seeds > 1 else ""
    return f"{job};\n{seeds}number at a line's end: mean of the last 3 evaluations"


def _draw_accuracy(axis: Axes, records: Sequence[Record], plan: Plan) -> None:
    """Draw a line per method, with the spread over the seeds behind it and its name at its end."""
    lowest = 100.0
    for method in plan.methods:
        steps, means, deviations = _curve(records, method)
        axis.plot(steps, means, color=COLOURS[method], linestyle=DASHES[method], linewidth=2.4)
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=COLOURS[method], alpha=0.16, linewidth=0)
        lowest = min(lowest, *low[len(low) // 5 :])  # the steep start may leave the picture
    bottom = max(0.0, 10 * (lowest // 10))
    axis.set_ylim(bottom, 100)
    axis.set_xlim(0, plan.steps)
    _name_lines(axis, results(records), plan.steps, apart=(100 - bottom) * 0.065)
    axis.set_title("Accuracy on clean test data", loc="left")
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.set_xlabel("training step")
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0)


def _curve(records: Sequence[Record], method: str) -> tuple[list[int], list[float], list[float]]:
    """Return the steps, and mean and deviation of the accuracy over the seeds at each."""
    at: dict[int, list[float]] = {}
    for record in records:
        if record.method == method:
            at.setdefault(record.step, []).append(record.accuracy)
    means, deviations = zip(*(spread(values) for values in at.values()), strict=True)
    return list(at), list(means), list(deviations)


def _name_lines(axis: Axes, outcome: dict[str, list[Result]], end: int, apart: float) -> None:
    """Write each method's name and final accuracy at its line's end, at least `apart` percent from the next."""
    finals = {method: spread([run.final for run in runs])[0] for method, runs in outcome.items()}
    height = 100 + apart
    for method, final in sorted(finals.items(), key=lambda item: -item[1]):
        height = min(final, height - apart)
        axis.annotate(
            f"{NAMES[method]} {final:.1f} %",
            (end, height),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[method],
            fontweight="bold",
            annotation_clip=False,
        )


def _draw_kept(axis: Axes, runs: Sequence[Result], plan: Plan) -> None:
    """Draw a bar per rank, as long as the share of steps in which it was kept, and one for no agreement."""
    shares = [100 * spread(kept)[0] for kept in zip(*(run.kept for run in runs), strict=False)]
    method = runs[0].method
    stride = -(-len(shares) // ALL_LABELLED)
    two_lines = len(shares) <= TWO_LINES
    for rank, share in enumerate(shares):
        wrong = rank in plan.corrupt_ranks
        crowded = rank % stride or (stride > 1 and any(abs(rank - other) < stride for other in plan.corrupt_ranks))
        name = f"rank {rank}{chr(10) if two_lines else ': '}wrong labels" if wrong else f"rank {rank}"
        _bar(axis, rank, share, WRONG if wrong else COLOURS[method], name if wrong or not crowded else "", wrong)
    skipped = 100 * spread([run.skipped for run in runs])[0]
    below = len(shares) - 1 + 1.15 * stride
    _bar(axis, below, skipped, "#aaaaaa", "no agreement,\nstep left out" if two_lines else "step left out", False)
    axis.set_xlim(0, 118)
    axis.set_ylim(below + 0.5 * stride, -0.6)
    axis.set_title(f"How often {NAMES[method]}\nkept each rank", loc="left")
    axis.set_axis_off()
    axis.plot([0, 0], [-0.5, below + 0.45 * stride], color="black", linewidth=0.8)


def _bar(axis: Axes, at: float, share: float, colour: str, name: str, bold: bool) -> None:
    """Draw one bar with its name before it and its length in percent behind it; neither if it has no name."""
    axis.barh(at, share, height=0.72, color=colour)
    if name:
        ink = colour if bold else "black"
        axis.text(-3, at, name, va="center", ha="right", color=ink, fontweight="bold" if bold else "normal")
        axis.text(share + 2, at, f"{share:.0f} %", va="center", color=ink, fontweight="bold", bbox=BLANK)
