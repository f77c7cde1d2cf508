"""Steps of a state for tests of AgreementLog, and what the log wrote of them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaf_ddp import ConsensusAgreement, GAFState
from gaf_ddp.rules.agreement import Agreement, decide
from tests.monitor.decisions import end_step

FINE = torch.eye(3) + 0.2
SPOILT = torch.tensor([[1.2, 0.2, math.nan], [0.2, 1.2, math.nan], [math.nan, math.nan, math.nan]])


def decided(gramian: Tensor) -> Agreement:
    return decide(gramian, ConsensusAgreement(), 10.0)


def take(state: GAFState, *gramians: Tensor) -> None:
    """End a step of the state with a decision for each Gramian."""
    end_step(state, *map(decided, gramians))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
