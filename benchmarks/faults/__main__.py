"""Break jobs in every way, and write down what became of them.

    python -m benchmarks.faults --out benchmarks/results/faults.md

Three ranks on gloo, a group time-out of 8 s. Every fault is met by every way of averaging, and by plain DDP.
"raised 0.1 s" is from the fault to the last survivor's exception. Faults of links need root and iproute2
(tools/hosts.py). Takes some 20 minutes on two cores.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from benchmarks.command_line import described, new_file, positive
from benchmarks.faults.declare import ALLOWED, FAULTS, GROUP_TIMEOUT, PLAIN, SETUPS, WORLD_SIZE, Fault
from benchmarks.faults.job import Outcome, run, seen
from tools.hosts import why_no_hosts


def shortened(text: str) -> str:
    """Return a message without what differs between runs."""
    text = re.sub(r"\[?/?[\w./-]*\w+\.(cc|cpp|h):\d+\]? ?", "", text)
    text = re.sub(r"\[?(\d+\.\d+\.\d+\.\d+|::1|127\.0\.0\.1)\]?:\d+", "ADDRESS", text)
    text = re.sub(r"rank \d", "rank r", text).replace("|", "\\|")
    return text if len(text) <= 150 else text[:147] + "…"


def cell(outcome: Outcome | None) -> str:
    """Return a cell of the table."""
    if outcome is None:
        return "-"
    words = outcome.verdict + f" {outcome.seconds:.1f} s" * (outcome.verdict == "raised")
    words += " UNEQUAL" * (not outcome.equal)
    return words if outcome.is_fine else f"**{words}**"


def table(outcomes: dict[tuple[str, str], Outcome], setups: list[str]) -> str:
    """Return the page."""
    names = list(dict.fromkeys(fault for fault, _ in outcomes))
    bad = [o for o in outcomes.values() if not o.is_fine and o.setup != PLAIN]
    about = ", ".join(f"{name} {value}" for name, value in seen().items())
    count = sum(o.setup != PLAIN for o in outcomes.values())
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.faults`, {about}.",
        f"{WORLD_SIZE} ranks on gloo, group time-out {GROUP_TIMEOUT:.0f} s.",
        "Seconds from the fault to the last survivor's exception. In bold: a hang, survivors that are not equal",
        "to the bit after a step they both took, an exception more than",
        f"{ALLOWED:.0f} s later than the time-out, or training that should have gone on and did not.",
        f"With the filter: {len(bad)} of {count}.",
        f"From that exception until the last survivor's process had ended: {_leaving(outcomes, False)}; with",
        f"plain DDP {_leaving(outcomes, True)}.",
        "",
        "| | " + " | ".join(setups) + " |",
        "|---|" + "---|" * len(setups),
        *(f"| {name} | " + " | ".join(cell(outcomes.get((name, s))) for s in setups) + " |" for name in names),
        "",
        "## What survivors were told",
        "",
        "With plain DDP, where it met that, and with the first way that filters; then what the broken rank was.",
        "",
    ]
    for name in names:
        met = [outcomes[name, s] for s in setups if (name, s) in outcomes]
        told = [each for each in met if each.said or each.victim != "nothing"]
        for found in told[: 1 + (met[0].setup == PLAIN)]:
            said = list(dict.fromkeys(map(shortened, found.said)))[:2] or ["nothing"]
            lines.append(f"- {name}; {found.setup}: {'; '.join(said)} (it: {shortened(found.victim)})")
    return "\n".join(lines) + "\n"


def _leaving(outcomes: dict[tuple[str, str], Outcome], plain: bool) -> str:
    took = [o.gone - o.seconds for o in outcomes.values() if o.verdict == "raised" and (o.setup == PLAIN) == plain]
    return f"{median(took):.1f} s, at most {max(took):.1f} s" if took else "nobody raised"


def main() -> None:
    """Run what was asked for."""
    parser = described(__doc__)
    parser.add_argument("--out", type=new_file, help="where the table goes; printed without")
    parser.add_argument("--only", default="", help="faults whose name matches this pattern")
    parser.add_argument("--setups", default="", help="ways to average whose name matches this pattern")
    parser.add_argument("--at-once", type=positive, default=3, help="jobs at a time (3); most only wait")
    given = parser.parse_args()
    setups = [name for name in SETUPS if re.search(given.setups, name)]
    problem = why_no_hosts()
    faults = [f for f in FAULTS if re.search(given.only, f.name) and not (problem and f.on_links)]
    if problem:
        print(f"no faults of links: {problem}", file=sys.stderr)

    def job(pair: tuple[Fault, str]) -> Outcome:
        outcome = run(pair[1], pair[0])
        told = f"{pair[0].name:45} {pair[1]:16} {cell(outcome)}, gone {outcome.gone:.1f} s"
        print(told, file=sys.stderr, flush=True)
        return outcome

    pairs = [(fault, setup) for fault in faults for setup in setups if fault.meets(setup)]
    with ThreadPoolExecutor(given.at_once) as pool:
        outcomes = {(o.fault.name, o.setup): o for o in pool.map(job, pairs)}
    page = table(outcomes, setups)
    if given.out is None:
        print(page)
    else:
        given.out.write_text(page)
    sys.exit(not all(o.is_fine for o in outcomes.values() if o.setup != PLAIN))


if __name__ == "__main__":
    main()
