"""What a training run is and what an experiment is: frozen declarations, nothing that computes."""

import json
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Labels:
    """What is wrong with the training labels.

    kind: `"clean"`; `"shift"`, the class after the right one; `"shuffled"`, those of other examples; `"uniform"`,
    `share` of them another class at random; `"human"`, the label set called `column`; `"own classes"`, right, but
    a rank sees only its `classes`; of text, only its registers.
    ranks: whose labels are wrong (their own copy of them); () is everyone's.
    classes: which classes each rank sees, in rank order.
    """

    kind: Literal["clean", "shift", "shuffled", "uniform", "human", "own classes"] = "clean"
    ranks: tuple[int, ...] = ()
    share: float = 0.0
    column: str = ""
    classes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Fault:
    """What a rank does to its gradient before the others see it.

    kind: a name in `faults.FAULTS` or `peers.ATTACKS`.
    others: ranks that send the same as that one.
    """

    kind: str
    rank: int
    others: tuple[int, ...] = ()

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """Every rank with the fault."""
        return (self.rank, *self.others)


@dataclass(frozen=True)
class Reference:
    """Held-out data that the consensus rule is given (`GAFState.reference`).

    every: steps from one reading to the next.
    examples: how many there are, over all ranks; None for the whole validation part.
    wrong: share of their labels that are another class at random.
    lacks: classes that they have none of; of text, registers.
    same: whether every rank reads all of them, and not a share of its own.
    training: whether they are what ranks train on, each its own, wrong labels with it.
    """

    every: int = 20
    examples: int | None = None
    wrong: float = 0.0
    lacks: tuple[int, ...] = ()
    same: bool = False
    training: bool = False


PAST = "@7a1f1ee"
PAPER_TAUS = (0.9, 0.95, 0.98, 1.0)  # cosine distances, around those that the paper recommends


@dataclass(frozen=True)
class Rule:
    """How the ranks' gradients become one; the names are in `rules.RULES`.

    A name that ends in PAST is of that commit's code, which judged in the same step and had more rules. Its runs stay
    beside today's, and no more are made.

    parameter: tau for the filters, what the rule's own documentation says for the others.
    like: for the random controls, the rule whose acceptance, step by step, they repeat.
    reference: held-out data, for the consensus rule.
    """

    name: str
    parameter: float | None = None
    like: "Rule | None" = None
    reference: Reference | None = None

    @property
    def is_past(self) -> bool:
        """Whether this code cannot make its runs."""
        return self.name.endswith(PAST) or (self.like is not None and self.like.is_past)


AVERAGING = Rule("averaging")


@dataclass(frozen=True)
class Run:
    """One training run, declared in full: equal declarations give equal results.

    ranks: who takes part, as ranks of a world that large (the oracle leaves some out).
    engine: `"one process"` computes the ranks one after the other; `"ddp"` starts one process for each.
    augment: whether training images are shifted by up to four pixels, and half of them turned left to right.
    balanced: whether each batch has as many images of every class, by the labels that its rank sees.
    """

    data: str
    model: str
    ranks: tuple[int, ...]
    batch: int
    steps: int
    lr: float
    seed: int = 0
    labels: Labels = Labels()
    fault: Fault | None = None
    rule: Rule = AVERAGING
    weight_decay: float = 1e-4
    evaluate_every: int = 20
    optimizer: Literal["sgd", "adam"] = "sgd"
    engine: Literal["one process", "ddp"] = "one process"
    augment: bool = False
    balanced: bool = False

    @property
    def key(self) -> str:
        """What tells this declaration from others: a new field with a default leaves it as it is."""
        return json.dumps(plain(self), sort_keys=True)


def plain(declaration: Any) -> dict[str, Any]:
    """Return what of a declaration is not a default, as JSON can hold it."""
    values = {f.name: getattr(declaration, f.name) for f in fields(declaration)}
    told = {f.name: values[f.name] for f in fields(declaration) if values[f.name] != f.default}
    return {name: plain(value) if is_dataclass(value) else value for name, value in told.items()}


@dataclass(frozen=True)
class Experiment:
    """One setting in which every arm is trained.

    base: averaging at the setting's own learning rate, seed 0.
    bad: ranks the oracle leaves out; () with wrong labels everywhere: the oracle has right ones.
    tau: the filter's, for the arms that are judged; the default tau of 1.0 has an arm of its own.
    arms: names in `arms.ARMS`.
    lrs: what averaging may choose its learning rate from.
    taus: what the paper's rule may choose its tau from.
    real_arms, real_seeds: what is trained a second time on real DDP ranks.
    """

    name: str
    group: str
    title: str
    base: Run
    arms: tuple[str, ...]
    tau: float = 0.9
    bad: tuple[int, ...] = ()
    lrs: tuple[float, ...] = ()
    taus: tuple[float, ...] = PAPER_TAUS
    seeds: int = 3
    first_seed: int = 0
    real_arms: tuple[str, ...] = ()
    real_seeds: int = 0
    notes: dict[str, Any] = field(default_factory=dict)  # coordinates for the group's own table and plot
