"""Draw what the benchmarks wrote into a folder.

    python -m benchmarks.pictures FOLDER

`collectives*.json` become collectives.png, `step_time*.json` step_time.png, and `batch*.json`, of `step_time` too,
batch.png. A file holds one run or a list of them. Times are ratios within one run; several runs of one setting are
all drawn.
"""

from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command_line import described
from benchmarks.measure import machine, read_runs

HERE = Path(__file__).parent / "results"
COLOURS = {"gaf_late": "#009E73", "gaf_sketch": "#CC79A7", "gaf_sharded": "#0072B2", "gaf_gather": "#D55E00"}
SCOPES = {"gaf-bucket-sharded": "#0072B2", "gaf-model-sharded": "#009E73"}
MARKERS = "osD^v"
_RATIOS = (1, 1.2, 1.5, 2, 3, 4, 6, 8)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the results of one benchmark, by world size and link."""
    found = [result for path in sorted(folder.glob(f"{name}*.json")) for result in read_runs(path)]
    return sorted(found, key=lambda result: (_link(result), result["hardware"]["world_size"]))


def label(result: dict[str, Any]) -> str:
    """Return what tells one result from the others."""
    return f"{result['hardware']['world_size']} ranks, {_link(result)}"


def draw_collectives(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of the exchanges relative to an all-reduce, over the bucket's bytes."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(results), figsize=(4.5 * len(results), 3.6), sharey=True, squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for name, colour in COLOURS.items():
            rows = [row for row in result["rows"] if row["collective"] == name]
            if not rows:
                continue
            sizes, ratios = [row["size"] for row in rows], [row["to_all_reduce"]["median"] for row in rows]
            axis.plot(sizes, ratios, "o-", color=colour, label=name.removeprefix("gaf_"))
        axis.axhline(1.0, color="0.6", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="bucket, bytes", title=label(result))
        axis.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time, all-reduce = 1")
    axes[0][0].legend(frameon=False)
    _save(figure, results, path)


def draw_step_time(results: list[dict[str, Any]], path: Path) -> None:
    """Draw backward with each hook relative to plain DDP, one marker per number of ranks and link."""
    pyplot = _pyplot()
    hooks = list(dict.fromkeys(row["hook"] for result in results for row in result["rows"]))
    figure, axis = pyplot.subplots(figsize=(8, 0.8 + 0.33 * len(hooks)))
    for i, result in enumerate(results):
        rows = [row for row in result["rows"] if row["hook"] != "ddp"]
        place = [hooks.index(row["hook"]) + 0.12 * (i - len(results) / 2) for row in rows]
        ratios = [row["backward"]["median"] for row in rows]
        axis.plot(ratios, place, MARKERS[i % len(MARKERS)], label=label(result))
    axis.axvline(1.0, color="0.6", linewidth=1)
    axis.set(xscale="log", xlabel="time of backward, plain DDP = 1", title=f"A DDP training step of {_models(results)}")
    ticks = [0.2, 0.5, 0.7, 1, 1.5, 2, 4]
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set_yticks(range(1, len(hooks)), hooks[1:])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, results, path)


def draw_batches(results: list[dict[str, Any]], path: Path) -> None:
    """Draw backward in both scopes relative to plain DDP, over the batch: all runs, a line by their medians."""
    figure, axis = _pyplot().subplots(figsize=(6, 3.6))
    worlds = sorted({result["hardware"]["world_size"] for result in results})
    for (hook, colour), (i, world) in product(SCOPES.items(), enumerate(worlds)):
        runs = _by_batch(results, hook, world)
        if not runs:
            continue
        look = {"color": colour, "alpha": 0.6**i}
        name = f"{hook.split('-')[1]} scope, {world} ranks"
        axis.plot(list(runs), [median(ratios) for ratios in runs.values()], f"{MARKERS[i]}-", label=name, **look)
        points = [(size, ratio) for size, ratios in runs.items() for ratio in ratios]
        axis.plot(*zip(*points, strict=True), MARKERS[i], markersize=3, **look)
    sizes = sorted({result["hardware"]["input"][0] for result in results})
    axis.axhline(1.0, color="0.6", linewidth=1)
    axis.set(xscale="log", xlabel="images of each rank in a step", ylabel="time of backward, plain DDP = 1")
    axis.set_title(f"{_models(results)}, {_link(results[0])}")
    axis.set_xticks(sizes, map(str, sizes))
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    _save(figure, results, path)


def draw_scaling(results: list[dict[str, Any]], path: Path) -> None:
    """Draw time and bytes relative to an all-reduce, over W: two panels for each number of ranks per host."""
    grid = {"figsize": (10, 4 * len(results)), "layout": "constrained", "squeeze": False, "sharey": "col"}
    figure, axes = _pyplot().subplots(len(results), 2, **grid)
    for line, result in zip(axes, results, strict=True):
        _scaling_panels(line, result)
    facts = results[0]["hardware"]
    megabytes = facts["bucket_bytes"] / 2**20
    figure.suptitle(f"One bucket of {megabytes:.0f} MB: model, with constants measured on this machine")
    figure.supxlabel(machine(facts), fontsize=8, color="0.4")
    figure.savefig(path, dpi=120)


def _scaling_panels(axes: Any, result: dict[str, Any]) -> None:
    """Draw one result: the model, and dots where it was measured."""
    rows, per_host = result["rows"], f"{result['hardware']['ranks_per_host']} per host"
    worlds = [row["W"] for row in rows]
    titles = {
        "time_ratio": "Time, all-reduce = 1 (dots: measured)",
        "bytes_ratio": "Bytes that leave hosts, ring all-reduce = 1",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for exchange, colour in COLOURS.items():
            name = exchange.removeprefix("gaf_")
            if name not in rows[0]:
                continue
            values = [row[name][key] for row in rows]
            axis.plot(worlds, values, color=colour)
            at = {"late": len(worlds) - 2, "sketch": 1}.get(name, len(worlds) // 2 - 1)
            axis.annotate(name, (worlds[at], values[at]), textcoords="offset points", xytext=(0, 8), color=colour)
        axis.axhline(1.0, color="0.6", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=f"ranks W, {per_host}", title=title)
        axis.set_yticks(_RATIOS, [f"{ratio:g}" for ratio in _RATIOS])
        axis.set_xticks(worlds, [str(w) for w in worlds])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    points = [row["measured"] for row in rows if row["measured"]]
    for exchange, colour in COLOURS.items():
        name = exchange.removeprefix("gaf_")
        dots = [(point["W"], point[name] / point["all_reduce"]) for point in points if name in point]
        axes[0].plot([world for world, _ in dots], [ratio for _, ratio in dots], "o", color=colour)


def _by_batch(results: list[dict[str, Any]], hook: str, world: int) -> dict[int, list[float]]:
    """Return each run's ratio of backward, by the images of each rank in a step."""
    found: dict[int, list[float]] = {}
    for result in sorted(results, key=lambda result: result["hardware"]["input"][0]):
        for row in result["rows"]:
            if row["hook"] == hook and result["hardware"]["world_size"] == world:
                found.setdefault(result["hardware"]["input"][0], []).append(row["backward"]["median"])
    return found


DRAWN = {"collectives": draw_collectives, "step_time": draw_step_time, "batch": draw_batches}


def main() -> None:
    """Draw every picture there are results for."""
    parser = described(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    folder = parser.parse_args().folder
    if not any(read(folder, name) for name in DRAWN):
        parser.error(f"FOLDER must hold results called {'*.json, '.join(DRAWN)}*.json, found none in {folder}")
    for name, draw in DRAWN.items():
        if results := read(folder, name):
            draw(results, folder / f"{name}.png")
            print(folder / f"{name}.png")


def _link(result: dict[str, Any]) -> str:
    return str(result["hardware"].get("link", "one machine"))


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _models(results: list[dict[str, Any]]) -> str:
    return " and ".join(sorted({result["hardware"]["model"] for result in results}))


def _save(figure: Any, results: list[dict[str, Any]], path: Path) -> None:
    days = sorted({result["hardware"]["date"] for result in results})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    note = machine({**results[0]["hardware"], "date": when})
    figure.text(0.01, -0.06, note, fontsize=8, color="0.4")
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
