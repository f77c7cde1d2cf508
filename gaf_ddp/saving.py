"""What of a GAFState goes into a checkpoint, and what a checkpoint must look like before anything of it is taken."""

from typing import TYPE_CHECKING, Any

from gaf_ddp.settings import require

if TYPE_CHECKING:
    from gaf_ddp.state import GAFState

_NOTHING = b"-"  # no memory; `torch.load` refuses b"" where it unpickles no code
_VERSION = 4


def to_dict(state: "GAFState") -> dict[str, Any]:
    """Return plain numbers in lists, and bytes without code; the same keys always."""
    state._catch_up()
    memory = _NOTHING if state._judge is None else state._judge.dump()
    return {"version": _VERSION, "step": state.step, "memory": memory, **state._records.statistics.state_dict()}


def from_dict(state: "GAFState", saved: dict[str, Any]) -> None:
    """Restore what `to_dict` returned; ValueError if it is something else, nothing is changed then."""
    state._catch_up()
    _require_saved(saved)
    judge, memory = state._new_judge(), saved["memory"]
    if judge is not None and memory != _NOTHING:
        judge.load(memory)
    state._records.statistics.load_state_dict(saved)
    state.step, state._judge = saved["step"], judge
    if state._way is not None:
        state._way.recall()


def _require_saved(state_dict: Any) -> None:
    """Raise ValueError unless this is a state dict of `GAFState`, as far as it can be seen from outside."""
    found = state_dict.get("version", _VERSION) if isinstance(state_dict, dict) else _VERSION
    require(found == _VERSION, f"state_dict's version must be {_VERSION}", found)
    keys = set(state_dict) if isinstance(state_dict, dict) else state_dict
    names = {"memory", "totals", "reset", "history", "noise", "step", "version"}
    require(keys == names, f"state_dict must hold {sorted(names)}", keys)
    step, memory = state_dict["step"], state_dict["memory"]
    require(type(step) is int and step >= 0, "state_dict's step must be an integer >= 0", step)
    require(isinstance(memory, bytes), "state_dict's memory must be bytes", memory)
