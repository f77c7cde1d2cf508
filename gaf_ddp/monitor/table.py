"""A table of the ranks as a log's last record has them, for the terminal and for the page."""

from gaf_ddp.monitor.absences import OUT
from gaf_ddp.monitor.log_reader import Record

HEAD = ("rank", "kept", "z", "out since", "trusted since", "condemned since", "host")
_NONE = "-"


def rows(record: Record) -> list[tuple[bool, list[str]]]:
    """Return of each rank whether it is out, and a text for each column; those that are out come first."""
    found = [(_is_out(rank), _row(rank)) for rank in record["ranks"]]
    return sorted(found, key=lambda row: not row[0])


def _is_out(rank: Record) -> bool:
    return rank["kept"] is not None and (rank["kept"] < OUT or rank.get("condemned_since") is not None)


def _row(rank: Record) -> list[str]:
    kept = "finished" if rank["kept"] is None else f"{100 * rank['kept']:.0f} %"
    distance = _NONE if rank["distance"] is None else f"{rank['distance']:.1f}"
    since = [rank.get(name) for name in ("out_since", "trusted_since", "condemned_since")]
    steps = [_NONE if step is None else str(step) for step in since]
    return [str(rank["rank"]), kept, distance, *steps, rank["host"] or _NONE]
