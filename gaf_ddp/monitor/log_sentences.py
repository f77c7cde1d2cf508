"""What a log says, in sentences: what was seen, what it means, what to do next."""

from collections.abc import Sequence

from gaf_ddp.monitor.absences import Absence, absences
from gaf_ddp.monitor.log_reader import Record, name

_NEXT = {
    "nonfinite": "numbers overflow there: look at the learning rate, the loss scale and the device.",
    "zero": "nothing is learnt there: look at whether its loader yields data, and its loss depends on the model.",
    "overlong": "its loss scale or its inputs are too large, or it is honest, with data that the others do not have: "
    "give the filter held-out data (state.reference), or look at its data.",
    "judged": "held-out data say it does harm: look at its data and its device.",
    "unclear": "broken, or honest with data of its own? Held-out data say nothing of it yet: give more of them, or "
    "look at its data and its device.",
    "far": "broken, or honest with data of its own? Give the filter held-out data (state.reference), or look at its "
    "data and its device.",
}


def sentences(records: Sequence[Record]) -> list[str]:
    """Return what the log says, a sentence each: ranks that are out first, and last what to do next."""
    last, found = records[-1], absences(records)
    now = {absence.rank: absence for absence in found if absence.until is None}
    for rank in _since(last, "condemned_since"):
        now.setdefault(rank, Absence(rank, last["ranks"][rank]["condemned_since"], None, "", "judged"))
    said = [*_watching(records), *(_out(last, now[rank]) for rank in sorted(now))]
    said += [
        f"{_name(last, a.rank)} was out from step {a.since} to {a.until}: {a.why}."
        for a in found
        if a.until is not None
    ]
    trusted = _since(last, "trusted_since")
    said += [
        f"{_name(last, rank)} is far from the others and kept since step {since}: held-out data speak for it."
        for rank, since in trusted.items()
    ]
    told = {*now, *(absence.rank for absence in found if absence.reason == "nonfinite")}
    said += [each for rank in range(len(last["ranks"])) if rank not in told for each in _nonfinite(records, rank)]
    done = [rank["rank"] for rank in last["ranks"] if rank["kept"] is None]
    said += [f"{_name(last, rank)} has finished: it is out of inputs." for rank in done]
    others = [rank for rank in last["ranks"] if rank["rank"] not in {*done, *now, *trusted}]
    return [*_first(last, others, now), *said, *_last(others, now), *_of_all(records), *_next(last, now)]


def _name(record: Record, rank: int) -> str:
    return name(record, rank).replace("rank", "Rank", 1)


def _since(record: Record, verdict: str) -> dict[int, int]:
    """Return the ranks of which held-out data say that, with the step since when; older logs do not know it."""
    ranks = record["ranks"]
    return {rank["rank"]: rank[verdict] for rank in ranks if rank.get(verdict) is not None and rank["kept"] is not None}


def _out(record: Record, absence: Absence) -> str:
    condemned = record["ranks"][absence.rank].get("condemned_since")
    since = absence.since if condemned is None else min(absence.since, condemned)
    is_out = "would be left out" if record.get("watch") else "is out"
    said = f"{_name(record, absence.rank)} {is_out} since step {since}: "
    if condemned is None:
        return f"{said}{absence.why}."
    return said + f"held-out data speak against it{f' since step {condemned}' if condemned > since else ''}."


def _first(record: Record, others: Sequence[Record], now: dict[int, Absence]) -> list[str]:
    if now or not others:
        return []
    least = min(others, key=lambda rank: rank["kept"])
    if least["kept"] == 1:
        return [f"No rank is out at step {record['step']}: all are kept."]
    return [f"No rank is out at step {record['step']}: the least kept is rank {least['rank']}, {least['kept']:.0%}."]


def _watching(records: Sequence[Record]) -> list[str]:
    """Return whether, and until when, everyone was averaged; older logs do not know it."""
    watched = [record["step"] for record in records if record.get("watch")]
    if not watched:
        return []
    if records[-1].get("watch"):
        return ["Watching only: everyone is averaged. state.watch = False filters."]
    return [f"Up to step {watched[-1]} everyone was averaged (watch)."]


def _nonfinite(records: Sequence[Record], rank: int) -> list[str]:
    """Return how often a rank's gradient was not finite, if it ever was."""
    spoilt = [each for each in records if each["ranks"][rank]["nonfinite"]]
    number = sum(round(each["ranks"][rank]["nonfinite"] * each["decisions"]) for each in spoilt)
    if not number:
        return []
    times = f"{number} decision{'s' * (number > 1)}, the last one by step {spoilt[-1]['step']}"
    return [f"{_name(records[-1], rank)} had NaN or infinity in {times}: look at its loss scale and its device."]


def _last(others: Sequence[Record], now: dict[int, Absence]) -> list[str]:
    if not now or not others:
        return []
    least = min(rank["kept"] for rank in others)
    kept = "kept in all of the last decisions" if least == 1 else f"kept in at least {least:.0%} of the last decisions"
    return [f"The other {len(others)} ranks are {kept}." if len(others) > 1 else f"The other one is {kept}."]


def _of_all(records: Sequence[Record]) -> list[str]:
    """Return how often nothing agreed, and over how many batches averaging pays."""
    said, decisions = [], sum(record["decisions"] for record in records)
    skipped = sum(record["gaf/skipped_fraction"] * record["decisions"] for record in records) / decisions
    if skipped:
        said.append(f"In {skipped:.0%} of all decisions nothing agreed.")
    scale, averaged = records[-1].get("gaf/noise_scale"), len(records[-1]["ranks"])
    if scale is not None:
        more = "would still make better steps" if scale > averaged else "would hardly make better steps"
        said.append(
            f"The gradient noise scale is {scale:.3g} batches of a rank, and {averaged} are averaged: "
            f"more ranks or larger batches {more}."
        )
    return said


def _next(record: Record, now: dict[int, Absence]) -> list[str]:
    """Return what to do about the ranks that are out, a sentence for each reason."""
    reasons: dict[str, list[int]] = {}
    for rank, absence in sorted(now.items()):
        judged = record["ranks"][rank].get("condemned_since") is not None
        reason = "judged" if judged else absence.reason
        reasons.setdefault(reason if reason in _NEXT else "far", []).append(rank)
    told = {**_NEXT, "far": _NEXT["unclear"] if record.get("held_out") else _NEXT["far"]}
    return [
        f"Next, for rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {told[why]}"
        for why, ranks in reasons.items()
    ]
