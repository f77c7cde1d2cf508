"""The tables, in Markdown: one for each experiment, and for some groups an overview before them."""

from collections.abc import Callable, Sequence

from benchmarks.accuracy.arms import beside_landed, title_of
from benchmarks.accuracy.declare import Experiment
from benchmarks.accuracy.summary import Row, Table, Tables

LEGEND = """Accuracy on clean test data in %, mean ± standard deviation over seeds. *final*: mean of the last three
evaluations; *best*: the highest of all (nobody can pick it without test data); *stopped*: at the highest
accuracy on held-out training data with the labels that training sees. *kept*: share of ranks in the
average, over all steps, of consensus by each step's verdict, which holds in the next; *skipped*: share of
steps left out. The best learning rate is picked by final test accuracy, in the control's favour. *on DDP
ranks*: the same runs (so many of them) repeated with one process per rank under DistributedDataParallel
(gloo) and the real hook; everything else computes the ranks one after the other in one process, with the
same filtering functions. *wrong labels learnt*: of up to 1,000 training images with a wrong label, how many the
model answers with that label at the end."""


def group_text(group: str, tables: Tables) -> str:
    """Return a group's tables."""
    overview = OVERVIEWS[group](tables) if group in OVERVIEWS else ""
    if group == "tau":
        return overview
    return "\n\n".join(part for part in (overview, *(_experiment(e, table) for e, table in tables)) if part)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _experiment(experiment: Experiment, table: Table) -> str:
    few = experiment.base.labels.kind == "own classes"
    real, learnt = (any(getattr(row, name) for row in table.values()) for name in ("real", "learnt"))
    header = ["", "final", "best", "stopped", "kept", "skipped"]
    header += ["wrong labels learnt"] * learnt + ["final, classes seen by fewest"] * few + ["on DDP ranks"] * real
    body = []
    for row in table.values():
        line = [row.title, str(row.final), str(row.best), str(row.stopped)]
        line += [f"{row.kept.mean:.0f} %", f"{row.skipped.mean:.0f} %"]
        line += [f"{row.learnt} %" if row.learnt else ""] * learnt
        body.append(line + [str(row.few)] * few + [f"{row.real} ({row.real.count})" if row.real else ""] * real)
    base, seeds = experiment.base, next(iter(table.values())).final.count
    told = f"{seeds} seed{'s' * (seeds > 1)}, {base.steps} steps, lr {base.lr:g}"
    apart = [number.mean for row in table.values() for number in row.distances][:2]
    if apart:
        told += (
            f". Two ranks' gradients under averaging: cosine distance {apart[0]:.2f} in the first tenth of the steps, "
        )
        told += f"{apart[1]:.2f} in the last"
    return f"### {experiment.title}\n\n{told}\n\n{markdown(header, body)}"


def _broken(tables: Tables) -> str:
    arms = ("averaging", "guard only", "neighborhood", "default", "consensus", "sequential", "krum",
            "upgrad", "oracle")  # fmt: skip
    return _faults(tables, arms, "broken rank first / last")


def _byzfl(tables: Tables) -> str:
    arms = ("averaging", "best lr", "neighborhood", "consensus", "tuned consensus", "consensus: random members",
            "mixing less", "mixing", "mixing more", "mixing most", "clipping", "oracle")  # fmt: skip
    return _faults(tables, arms, "one attacker of eight / three")


def _faults(tables: Tables, arms: Sequence[str], places_told: str) -> str:
    """Return faults down, arms across: final accuracy, by the bad ranks' place or number in one cell."""
    arms = beside_landed(arms)
    faults: dict[str, dict[int, Table]] = {}
    for e, table in tables:
        faults.setdefault(e.notes["fault"], {})[e.notes["rank"]] = table
    body = [
        [fault, *(" / ".join(_final(places[rank], arm) for rank in sorted(places)) for arm in arms)]
        for fault, places in faults.items()
    ]
    titles = [title_of(tables[0][0], arm) for arm in arms]
    return f"### Final accuracy, {places_told}\n\n{markdown(['fault', *titles], body)}"


def _final(table: Table, arm: str) -> str:
    return f"{table[arm].final.mean:.1f}" if arm in table else "-"


def _uniform(tables: Tables) -> str:
    """Return noise across, arms down."""
    parts = []
    for panel in dict.fromkeys(e.notes["panel"] for e, _ in tables):
        shown = [(e, table) for e, table in tables if e.notes["panel"] == panel]
        arms = [arm for arm in shown[0][0].arms if any(arm in table for _, table in shown)]
        body = [
            [title_of(shown[0][0], arm), *(str(table[arm].final) if arm in table else "" for _, table in shown)]
            for arm in arms
        ]
        header = ["final", *(f"{e.notes['share']:.0%} noise" for e, _ in shown)]
        parts.append(f"### {panel}\n\n{markdown(header, body)}")
    return "\n\n".join(parts)


def _tau(tables: Tables) -> str:
    """Return W and batch down, tau across: share of steps skipped, and of ranks kept."""
    cells = {tuple(e.notes[k] for k in ("labels", "world", "batch", "tau")): table for e, table in tables}
    taus = sorted({key[3] for key in cells})
    parts = []
    for labels in dict.fromkeys(key[0] for key in cells):
        places = dict.fromkeys(key[1:3] for key in cells if key[0] == labels)
        body = [
            [f"W={world}, batch {batch}", *(_shares(cells.get((labels, world, batch, tau), {})) for tau in taus)]
            for world, batch in places
        ]
        header = ["skipped / kept / final", *(f"tau {tau:g}" for tau in taus)]
        parts.append(f"### {labels} labels (digits)\n\n{markdown(header, body)}")
    return "\n\n".join(parts)


def _shares(table: Table) -> str:
    row: Row | None = table.get("neighborhood")
    return f"{row.skipped.mean:.0f} % / {row.kept.mean:.0f} % / {row.final.mean:.1f}" if row else ""


OVERVIEWS: dict[str, Callable[[Tables], str]] = {
    "broken": _broken,
    "uniform": _uniform,
    "tau": _tau,
    "byzfl": _byzfl,
}
