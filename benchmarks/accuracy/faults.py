"""Broken ranks and attackers: what one of them puts in place of its gradient before the others see it.

A fault gets the honest gradients `(H, n)` of the step, the bad rank's own `(n,)`, a memory of its own that lasts
as long as the run, and a seeded generator; it returns what the bad rank sends.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.accuracy import peers
from gaf_ddp.rules.memory import MOMENTUM

Fault = Callable[[Tensor, Tensor, dict[str, Tensor], torch.Generator], Tensor]

NOISE = 5.0  # length of the Gaussian noise, in units of the bad rank's own gradient's
LITTLE = 1.5  # standard deviations from the mean in a-little-is-enough
CLOSE = 2.8  # z at which the attacker who knows the rule stays; its ratio is 3
PRODUCT = 10.0  # length of the inner-product manipulation, in units of the honest mean's


def _gaussian(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    noise = torch.randn(own.shape, generator=random).to(own)
    length: Tensor = NOISE * own.norm() / noise.norm()
    return noise * length


def _knows_the_rule(honest: Tensor, own: Tensor, memory: dict[str, Tensor], random: torch.Generator) -> Tensor:
    """Return the gradient that takes the attacker's momentum just within the rule's reach, against the honest.

    It knows all honest gradients and the rule's constants, keeps the honest momenta as the rule does, and stays at
    z = CLOSE from their mean, on the side that undoes what they have learned over the rule's memory.
    """
    count = len(honest)
    momenta = memory["momenta"] = MOMENTUM * memory.get("momenta", torch.zeros_like(honest)) + honest
    mean = momenta.mean(0)
    others = (count * mean - momenta) / (count - 1)
    far = (momenta - others).norm(dim=1) / (1 + 1 / (count - 1)) ** 0.5
    reach = CLOSE * far.sort().values[(count - 1) // 2] * (1 + 1 / count) ** 0.5
    wanted: Tensor = mean - reach * mean / mean.norm().clamp(min=1e-30)
    sent: Tensor = wanted - MOMENTUM * memory.get("own", torch.zeros_like(own))
    memory["own"] = wanted
    return sent


INSIDER = "knows the rule"

FAULTS: dict[str, Fault] = {
    "NaN": lambda honest, own, memory, random: torch.full_like(own, torch.nan),
    "sign flip": lambda honest, own, memory, random: -own,
    "x(-10)": lambda honest, own, memory, random: -10.0 * own,
    "x1000": lambda honest, own, memory, random: 1000.0 * own,
    "Gaussian noise": _gaussian,
    # Several buckets of one step are told apart by their length.
    "stuck at its first": lambda honest, own, memory, random: memory.setdefault(f"{len(own)}", own.clone()),
    # Baruch et al., "A Little Is Enough", NeurIPS 2019: within the spread of the honest, against them.
    "a little is enough": lambda honest, own, memory, random: honest.mean(0) - LITTLE * honest.std(0),
    INSIDER: _knows_the_rule,
    # Xie, Koyejo, Gupta, "Fall of Empires", UAI 2019: so far against the honest mean that the average turns.
    "inner product": lambda honest, own, memory, random: -PRODUCT * honest.mean(0),
}


def fault_named(kind: str) -> Fault:
    """Return one of FAULTS, or one of ByzFL's attacks."""
    if kind not in peers.ATTACKS:
        return FAULTS[kind]
    send = peers.attack(kind)
    return lambda honest, own, memory, random: send(honest).to(own)
