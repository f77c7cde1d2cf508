"""The faults, and the ways to average that meet them."""

import math
from typing import Any, NamedTuple

WORLD_SIZE, VICTIM = 3, 1
STEPS, FAULT_STEP = 8, 3  # a step in which DDP has laid its buckets out, and every connection is made
GROUP_TIMEOUT = 8.0  # seconds, of the group that trains
ALLOWED = 2.0  # seconds beyond it

# Settings of GAFState by name; None is DDP without a hook.
SETUPS: dict[str, dict[str, Any] | None] = {
    "plain DDP": None,
    "late": {},
    "late, every second step": {"judge_every": 2, "check_every": 2},
    "late, watching": {"watch": True, "check_every": 1},
    "sketch, bucket": {"tau": 2.0, "exchange": "sketch"},
    "sketch, model": {"tau": 2.0, "exchange": "sketch", "scope": "model"},
    "sharded, bucket": {"tau": 2.0, "exchange": "sharded"},
    "sharded, model": {"tau": 2.0, "exchange": "sharded", "scope": "model"},
    "gather, bucket": {"tau": 2.0, "exchange": "gather"},
    "gather, model": {"tau": 2.0, "exchange": "gather", "scope": "model"},
}
PLAIN = "plain DDP"


class Fault(NamedTuple):
    """Something that breaks in step FAULT_STEP, on rank VICTIM or on all.

    Attributes:
        what: what happens; see `rank.Breaking`.
        where: when in the step: `"begin"`, `"middle"` or `"end"` of backward, or `"before"`, `"inside"` or
            `"after"` one of COLLECTIVES, or of what is done ONE_STEP_LATE.
        on_all: on every rank.
        seconds: how long it lasts.
        finishes: whether training must go on as if nothing had been.
        with_plain: whether DDP without a hook has such a thing.
        with_late: whether what judges one step late has.
    """

    what: str
    where: str = "middle"
    on_all: bool = False
    seconds: float = math.inf
    finishes: bool = False
    with_plain: bool = True
    with_late: bool = True

    @property
    def on_links(self) -> bool:
        """Whether every rank needs a host of its own."""
        return self.what in ("cut", "slow")

    @property
    def limit(self) -> float:
        """Seconds by which every survivor must have been told."""
        return GROUP_TIMEOUT + ALLOWED

    @property
    def name(self) -> str:
        """What it is called in the table."""
        place = {"begin": "as backward begins", "middle": "in backward", "end": "after backward"}
        who = "on all ranks" if self.on_all else "on one rank"
        lasting = "for good" if self.seconds == math.inf else f"for {self.seconds:.0f} s"
        where = place.get(self.where, self.where)
        return {
            "kill": f"killed {where}",
            "stop": f"stopped {lasting}",
            "cut": f"link cut {lasting}",
            "slow": "0.1 Mbit/s on one host, 10 MB model",
            "raise": f"backward raises, caught, {who}",
            "weighting raises": f"weighting raises {who}",
            "weighting is nan": f"weighting returns NaN {who}",
            "weighting is negative": f"weighting returns -0.5 {who}",
            "weighting differs": "weighting differs on one rank",
            "memory": f"MemoryError in the hook {who}",
            "device memory": f"torch.OutOfMemoryError in the hook {who}",
            "step less": "one step less on one rank",
            "step more": "one step more on one rank",
            "no hook": "hook missing on one rank",
            "SIGINT": f"SIGINT {who}",
            "SIGTERM": f"SIGTERM {who}",
            "loader": "forked loader in every step",
        }[self.what]

    def meets(self, setup: str) -> bool:
        """Return whether there is such a fault with this way to average."""
        late, place = setup.startswith("late"), self.where.split()[-1]
        if place in (*COLLECTIVES, *ONE_STEP_LATE):
            return setup != PLAIN and late == (place in ONE_STEP_LATE)
        return (self.with_plain or setup != PLAIN) and (self.with_late or not late)


COLLECTIVES = ("scatter", "sum", "gather")  # of an exchange
ONE_STEP_LATE = ("average", "ballot", "verdict")
FAULTS = [
    *(Fault("kill", where) for where in ("begin", "middle", "end")),
    *(
        Fault("kill", f"{moment} {collective}", with_plain=False)
        for collective in (*COLLECTIVES, *ONE_STEP_LATE)
        for moment in ("before", "inside", "after")
        if (moment, collective) != ("inside", "verdict")  # it sends nothing
    ),
    Fault("stop", seconds=3, finishes=True),
    Fault("stop"),
    Fault("cut", seconds=3, finishes=True),
    Fault("cut"),
    Fault("slow"),
    *(
        Fault(f"weighting {how}", on_all=on_all, with_plain=False, with_late=False)
        for how, on_all in (("raises", False), ("raises", True), ("is nan", False), ("is nan", True))
    ),
    Fault("weighting is negative", with_plain=False, with_late=False),
    Fault("weighting differs", with_plain=False, with_late=False),
    Fault("memory", with_plain=False),
    Fault("memory", on_all=True, with_plain=False),
    Fault("device memory", with_plain=False),
    Fault("raise"),
    Fault("raise", on_all=True),
    Fault("step less"),
    Fault("step more"),
    Fault("no hook", with_plain=False),
    Fault("SIGINT"),
    Fault("SIGINT", on_all=True),
    Fault("SIGTERM", on_all=True),
    Fault("loader", finishes=True),
]
