"""The tables, in Markdown: one for each experiment, and for some groups an overview before them."""

from collections.abc import Callable, Sequence

from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.summary import Row, difference, rows_of

Rows = list[tuple[Experiment, list[Row]]]

LEGEND = """Accuracy on clean test data in %, mean ± standard deviation over seeds. *final*: mean of the last three
evaluations; *best*: the highest of all (nobody can pick it without test data); *stopped*: at the highest
accuracy on held-out training data with the labels that training sees. *kept*: share of ranks in the average,
over all steps; *skipped*: share of steps left out. The best learning rate is picked by final test accuracy, in
the control's favour. *on DDP ranks*: the same runs (so many of them) repeated with one process per rank
under DistributedDataParallel (gloo) and the real hook; everything else computes the ranks one after the other in
one process, with the same filtering functions."""


def group_text(group: str, experiments: Sequence[Experiment], store: Store) -> str:
    """A group's tables; experiments without finished runs are left out."""
    rows = [(e, found) for e in experiments if (found := rows_of(e, store))]
    overview = OVERVIEWS[group](rows) if rows and group in OVERVIEWS else ""
    if group == "tau":
        return overview
    return "\n\n".join(part for part in (overview, *(_experiment(e, found) for e, found in rows)) if part)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _experiment(experiment: Experiment, rows: Sequence[Row]) -> str:
    few = experiment.base.labels.kind == "own classes"
    real = any(row.real for row in rows)
    header = ["", "final", "best", "stopped", "kept", "skipped"]
    header += ["final, classes seen by fewest"] * few + ["on DDP ranks"] * real
    body = []
    for row in rows:
        line = [row.title, str(row.final), str(row.best), str(row.stopped)]
        line += [f"{row.kept.mean:.0f} %", f"{row.skipped.mean:.0f} %"]
        body.append(line + [str(row.few)] * few + [_real(row)] * real)
    base = experiment.base
    told = f"{rows[0].final.count} seeds, {base.steps} steps, lr {base.lr:g}"
    return f"### {experiment.title}\n\n{told}\n\n{markdown(header, body)}"


def _real(row: Row) -> str:
    return f"{row.real} ({row.real.count})" if row.real else ""


def _broken(rows: Rows) -> str:
    """Faults down, arms across: final accuracy with the bad rank first / last."""
    arms = ("averaging", "guard only", "neighborhood", "default", "momenta 0.7", "sequential", "krum", "upgrad",
            "oracle")  # fmt: skip
    faults: dict[str, dict[int, dict[str, Row]]] = {}
    for e, found in rows:
        faults.setdefault(e.notes["fault"], {})[e.notes["rank"]] = {row.arm: row for row in found}
    titles = [next((r.title for _, found in rows for r in found if r.arm == arm), arm) for arm in arms]
    body = [
        [fault, *(" / ".join(_final(places[rank], arm) for rank in sorted(places)) for arm in arms)]
        for fault, places in faults.items()
    ]
    return "### Final accuracy, broken rank first / last\n\n" + markdown(["fault", *titles], body)


def _final(rows: dict[str, Row], arm: str) -> str:
    return f"{rows[arm].final.mean:.1f}" if arm in rows else "-"


def _uniform(rows: Rows) -> str:
    """Noise across, arms down."""
    parts = []
    for panel in dict.fromkeys(e.notes["panel"] for e, _ in rows):
        shown = [(e, {row.arm: row for row in found}) for e, found in rows if e.notes["panel"] == panel]
        arms = [arm for arm in shown[0][0].arms if any(arm in found for _, found in shown)]
        body = [
            [_plain_title(arm, shown), *(str(found[arm].final) if arm in found else "" for _, found in shown)]
            for arm in arms
        ]
        header = ["final", *(f"{e.notes['share']:.0%} noise" for e, _ in shown)]
        parts.append(f"### {panel}\n\n{markdown(header, body)}")
    return "\n\n".join(parts)


def _plain_title(arm: str, shown: Sequence[tuple[Experiment, dict[str, Row]]]) -> str:
    return next(found[arm].title for _, found in shown if arm in found).split(" (0.")[0]


def _tau(rows: Rows) -> str:
    """W and batch down, tau across: share of steps skipped, and of ranks kept."""
    cells = {tuple(e.notes[k] for k in ("labels", "world", "batch", "tau")): found[0] for e, found in rows}
    taus = sorted({key[3] for key in cells})
    parts = []
    for labels in dict.fromkeys(key[0] for key in cells):
        places = dict.fromkeys(key[1:3] for key in cells if key[0] == labels)
        body = [
            [f"W={world}, batch {batch}", *(_shares(cells.get((labels, world, batch, tau))) for tau in taus)]
            for world, batch in places
        ]
        header = ["skipped / kept / final", *(f"tau {tau:g}" for tau in taus)]
        parts.append(f"### {labels} labels (digits)\n\n{markdown(header, body)}")
    return "\n\n".join(parts)


def _shares(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.skipped.mean:.0f} % / {row.kept.mean:.0f} % / {row.final.mean:.1f}"


def _candidates(rows: Rows) -> str:
    """Each rule minus its own two controls, with the standard error; a win is more than two of them."""
    parts = []
    for e, found in rows:
        by_arm = {row.arm: row for row in found}
        body = [
            [
                row.title,
                str(row.final),
                _gap(row, members),
                _gap(row, skips),
                _gap(row, control(by_arm, row.arm, "shuffled")),
                _gap(row, by_arm.get("best lr")),
            ]
            for row in found
            if (members := control(by_arm, row.arm, "members")) and (skips := control(by_arm, row.arm, "skips"))
        ]
        against = ("random members", "random skips", "its weights shuffled", "averaging at its best lr")
        header = ["rule", "final", *(f"minus {name}" for name in against)]
        parts.append(f"### {e.title}: rule minus control (± standard error)\n\n{markdown(header, body)}")
    return "\n\n".join(parts)


def control(rows: dict[str, Row], arm: str, name: str) -> Row | None:
    """The random control of an arm; name: "members", "skips" or "shuffled"."""
    if name == "shuffled":
        return rows.get(f"{arm}: shuffled")
    return rows.get(f"random {name}" if arm == "neighborhood" else f"{arm}: random {name}")


def _gap(row: Row, other: Row | None) -> str:
    if other is None:
        return ""
    mean, error = difference(row, other)
    verdict = " **win**" if mean > 2 * error > 0 else " loss" if -mean > 2 * error > 0 else ""
    return f"{mean:+.1f} ± {error:.1f}{verdict}"


OVERVIEWS: dict[str, Callable[[Rows], str]] = {
    "broken": _broken, "uniform": _uniform, "tau": _tau, "candidates": _candidates,
}  # fmt: skip
