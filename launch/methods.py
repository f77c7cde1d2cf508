"""The methods to compare, and what each one puts on a DDP model before training."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gaf_ddp import (
    ConsensusAgreement,
    GAFState,
    NeighborhoodAgreement,
    SequentialAgreement,
    gaf_hook,
    skip_on_disagreement,
)
from launch.ranks import Here
from launch.settings import Plan

# From tau to the rule that chooses ranks; None for plain averaging, which is DDP with no hook.
METHODS: dict[str, Callable[[float], Callable[[Tensor], Tensor]] | None] = {
    "average": None,
    "tau": NeighborhoodAgreement,
    "consensus": lambda _: ConsensusAgreement(),  # what GAFState() is without settings
    "paper": SequentialAgreement,
}
NAMES = {"average": "averaging", "tau": "tau", "consensus": "consensus", "paper": "paper"}
WIRE_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def attach(
    method: str, model: DistributedDataParallel, optimizer: Optimizer, plan: Plan, here: Here
) -> GAFState | None:
    """Let `method` decide how gradients are averaged, and leave out the steps in which nothing agrees."""
    rule = METHODS[method]
    if rule is None:
        return None
    is_consensus = method == "consensus"
    state = GAFState(
        here.group,
        weighting=rule(plan.tau),
        scope=None if is_consensus else plan.scope or "model",
        exchange="auto" if is_consensus else plan.exchange,
        start_step=plan.start_step,
        wire_dtype=WIRE_DTYPES[plan.wire_dtype],
        max_norm_ratio=plan.max_norm_ratio,
    )
    model.register_comm_hook(state, gaf_hook)
    skip_on_disagreement(optimizer, state)
    return state
