"""Experiments on digits, which need no data but scikit-learn's."""

from dataclasses import replace

from benchmarks.accuracy.arms import ALL, PEERS, WITH_TUNED
from benchmarks.accuracy.declare import Experiment, Fault, Labels, Run
from benchmarks.accuracy.faults import FAULTS, INSIDER
from benchmarks.accuracy.peers import ATTACKS

GRID = (0.005, 0.0125, 0.025, 0.1, 0.2)  # besides the setting's own 0.05
REAL = ("averaging", "random members", "neighborhood", "sequential")


def digits_run(world: int, batch: int, steps: int) -> Run:
    """Return averaging on digits, the base that experiments change."""
    return Run("digits", "mlp", tuple(range(world)), batch, steps, lr=0.05)


def shift() -> list[Experiment]:
    """Return a minority of ranks with the wrong label map; of sixteen ranks also one, and none."""
    settings = [(3, 26, (1,)), (4, 20, (0,)), (4, 20, (1,)), (4, 20, (3,)), (8, 10, (0, 3, 6))]
    return [
        Experiment(
            f"shift w{world} bad {'-'.join(map(str, bad))}",
            "shift",
            f"digits, W={world}, batch {batch}, wrong label map on rank {', '.join(map(str, bad))}",
            replace(digits_run(world, batch, 400), labels=Labels("shift", bad)),
            (*WITH_TUNED, "tuned consensus", *PEERS),
            bad=bad,
            lrs=(*GRID, 0.05),
            seeds=5,
            real_arms=(*REAL, "consensus"),
            real_seeds=3 if bad in ((0,), (0, 3, 6)) else 1,
            notes={"panel": f"W={world}, bad rank {', '.join(map(str, bad))}"},
        )
        for world, batch, bad in settings
    ] + [_of_sixteen(bad) for bad in ((0, 5, 10), (15,), ())]


def _of_sixteen(bad: tuple[int, ...]) -> Experiment:
    told = f"wrong label map on rank {', '.join(map(str, bad))}" if bad else "no wrong labels"
    return Experiment(
        f"shift w16 bad {'-'.join(map(str, bad))}" if bad else "shift w16 clean",
        "shift",
        f"digits, W=16, batch 10, {told}",
        replace(digits_run(16, 10, 400), labels=Labels("shift", bad) if bad else Labels()),
        (
            "averaging",
            "best lr",
            "neighborhood",
            "consensus",
            "tuned consensus",
            "consensus: random members",
            "oracle",
        ),
        bad=bad,
        lrs=(0.025, 0.05, 0.1, 0.2),
        real_arms=("averaging", "consensus") if len(bad) > 1 else (),
        real_seeds=3,
        notes={"panel": f"W=16, bad rank {', '.join(map(str, bad))}" if bad else "W=16, none bad"},
    )


def broken() -> list[Experiment]:
    """Return one broken rank of eight, the first or the last, and none."""
    kinds = [kind for kind in FAULTS if kind != INSIDER]
    return [_broken(None), *(_broken(Fault(kind, rank)) for kind in kinds for rank in (0, 7))]


def attack() -> list[Experiment]:
    """Return attackers who know the rule and its constants, one and three of eight."""
    arms = ("averaging", "best lr", "neighborhood", "consensus", "consensus: random members",
            *PEERS, "oracle")  # fmt: skip
    return [
        Experiment(
            f"attack {len(bad)} of 8", "attack", f"digits, W=8, batch 10, attackers on rank {told}",
            replace(digits_run(8, 10, 400), fault=Fault(INSIDER, bad[0], bad[1:])),
            arms, bad=bad, lrs=(0.025, 0.05, 0.1), notes={"panel": f"attackers on rank {told}"},
        )
        for bad in ((0,), (0, 3, 6))
        for told in (", ".join(map(str, bad)),)
    ]  # fmt: skip


def byzfl() -> list[Experiment]:
    """Return ByzFL's own attacks by one and by three of eight, and nobody's."""
    return [
        _of_byzfl("nobody", ()),
        *(_of_byzfl(kind, bad) for kind in ATTACKS for bad in ((0,), (0, 3, 6))),
    ]


def _of_byzfl(kind: str, bad: tuple[int, ...]) -> Experiment:
    told = f"{kind} on rank {', '.join(map(str, bad))}" if bad else "nobody attacks"
    arms = ("averaging", "best lr", "neighborhood", "consensus", "tuned consensus", "consensus: random members",
            *PEERS, "oracle")  # fmt: skip
    return Experiment(
        f"byzfl {kind} {len(bad)} of 8" if bad else "byzfl nobody",
        "byzfl",
        f"digits, W=8, batch 10, {told}",
        replace(digits_run(8, 10, 400), fault=Fault(kind, bad[0], bad[1:]) if bad else None),
        arms,
        bad=bad,
        lrs=(0.05, 0.1, 0.2),
        notes={"panel": told, "fault": kind, "rank": len(bad)},
    )


def _broken(fault: Fault | None) -> Experiment:
    kind, rank = (fault.kind, fault.rank) if fault else ("none", 0)
    few = ("averaging", "guard only", "default", "neighborhood", "consensus", "sequential",
           "oracle")  # fmt: skip
    return Experiment(
        f"broken {kind} rank {rank}" if fault else "broken none",
        "broken",
        f"digits, W=8, batch 10, {f'{kind} on rank {rank}' if fault else 'nothing broken'}",
        replace(digits_run(8, 10, 400), fault=fault),
        few if rank else (*ALL, "guard only", *PEERS),
        tau=0.95,
        bad=(rank,) if fault else (),
        lrs=(0.005, 0.02, 0.05),
        real_arms=("neighborhood", "consensus") if fault and rank == 0 else (),
        real_seeds=1,
        notes={"fault": kind, "rank": rank},
    )


def uniform() -> list[Experiment]:
    """Return the paper's case: everyone's labels are noisy alike."""
    return [
        Experiment(
            f"uniform w{world} {share:.0%}",
            "uniform",
            f"digits, W={world}, batch {batch}, {share:.0%} of the labels random",
            replace(digits_run(world, batch, 1000), labels=Labels("uniform", share=share), evaluate_every=50),
            tuple(arm for arm in WITH_TUNED if world > 2 or arm != "random members"),  # of two: both or none
            tau=tau,
            lrs=(0.002, 0.005, 0.0125, 0.05),
            seeds=5 if share == 0.4 else 3,
            real_arms=REAL[:-1] if share == 0.4 and world == 2 else (),
            real_seeds=1,
            notes={"share": share, "panel": f"W={world}, batch {batch}, tau {tau:g}"},
        )
        for world, batch, tau in ((2, 32, 0.7), (4, 20, 0.8))
        for share in (0.0, 0.2, 0.4, 0.6)
    ]


def tau() -> list[Experiment]:
    """Return one setting for each W, batch and tau, with clean and with noisy labels."""
    return [
        Experiment(
            f"tau w{world} b{batch} {tau:g} {kind}",
            "tau",
            f"digits, W={world}, batch {batch}, tau {tau:g}, {kind} labels",
            replace(digits_run(world, batch, 300), labels=labels),
            ("neighborhood",),
            tau=tau,
            seeds=2,
            notes={"world": world, "batch": batch, "tau": tau, "labels": kind},
        )
        for kind, labels in (("clean", Labels()), ("40 % random", Labels("uniform", share=0.4)))
        for world in (2, 4, 8, 16)
        for batch in (8, 16, 32, 64)
        for tau in (0.7, 0.8, 0.9, 0.95, 1.0)
        if world * batch <= 256
    ]


def classes() -> list[Experiment]:
    """Return honest ranks that differ; the oracle lets every rank see every class."""
    rest = tuple(range(8))
    pairs = tuple((2 * r, 2 * r + 1) for r in range(5))
    overlapping = tuple((*pairs[r], *pairs[(r + 1) % 5]) for r in range(5))
    settings = {
        "one rank alone has classes 8 and 9": (4, 20, (rest, rest, rest, (8, 9))),
        "every rank has its own two classes": (5, 16, pairs),
        "every class is on two of five ranks": (5, 16, overlapping),
    }
    return [
        Experiment(
            f"classes {name}", "classes", f"digits, W={world}, batch {batch}, {name}",
            replace(digits_run(world, batch, 400), labels=Labels("own classes", classes=classes)),
            (*ALL, *PEERS), tau=0.9, lrs=(*GRID, 0.05), seeds=3, notes={"panel": name},
        )
        for name, (world, batch, classes) in settings.items()
    ]  # fmt: skip
