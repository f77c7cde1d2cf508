"""The judge that has the consensus rule's memory: momenta of rows, and what the rule remembers beside them."""

import io
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gaf_ddp.agreement import Agreement, decide
from gaf_ddp.consensus_memory import MOMENTUM, Consensus, ConsensusMemory, move
from gaf_ddp.device import on_host
from gaf_ddp.gramian import Rows, gram
from gaf_ddp.judges import Rule
from gaf_ddp.weighting import Weighting, present


class ByConsensus:
    """Judge ranks by the consensus rule and its memory: what CONSENSUS does over steps, for one model.

    In bucket scope each bucket has a memory of its own. In model scope there is one, over the whole gradient; in
    running scope too, and each bucket is judged by what is known as it arrives: this step's matrices of the
    buckets that came, the last step's of the others.

    Memory: as much as the rows in float32, W k numbers a bucket for sketches. DDP lays its buckets out anew after
    the first step of a process; momenta begin anew then, save those that `load` brought, and in bucket scope the
    memories it brought, which wait for their layout. In the first step, whose buckets may hold other parameters,
    they stand in, and are not changed: that step's gradients are in no momenta, nor in a bucket's memory.
    """

    def __init__(self, ratio: float, scope: str) -> None:
        self._ratio, self._scope = ratio, scope
        self._momenta: dict[Hashable, Tensor] = {}  # (W, n) by bucket
        # (2, W, W) by bucket: Gramians of its momenta and its gradients
        self._matrices: dict[Hashable, Tensor] = {}
        self._memories: dict[Hashable, ConsensusMemory] = {}  # by bucket, or one, called None
        self._last: dict[Hashable, tuple[Tensor, Tensor]] = {}  # of this step: matrices and voters, by memory
        self._used: dict[Hashable, None] = {}  # in this step, in their order
        self._loaded: list[Tensor] = []  # momenta that wait for their buckets, in these' order
        self._loaded_memories: list[ConsensusMemory] = []  # in bucket scope, so too
        self._steps = 0  # of this process

    def measure(self, key: Hashable, rows: Rows) -> Tensor:
        """Add the rows to the momenta, and return both Gramians, `(2 W, W)`."""
        shape, like = (len(rows), len(rows[0])), rows[0]
        momenta = self._momenta.get(key)
        if momenta is None or momenta.shape != shape or momenta.device != like.device:
            momenta = self._find(shape, like)
        momenta.mul_(MOMENTUM)
        # A matrix in few launches, however many ranks; vectors one by one, where they lie.
        for momentum, row in [(momenta, rows)] if isinstance(rows, Tensor) else zip(momenta, rows, strict=True):
            momentum.add_(row)
        self._momenta[key] = momenta
        self._used[key] = None
        return torch.cat([gram(momenta), gram(rows)])

    def _find(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Return loaded momenta for the next bucket, if they are of its shape, or empty ones."""
        index = len(self._used)
        if index < len(self._loaded) and self._loaded[index].shape == shape:
            return self._loaded[index].to(like.device, copy=True)
        return torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def _remembered(self, index: int) -> ConsensusMemory:
        """Return the loaded memory of the bucket of this index in bucket scope, or an empty one."""
        if index < len(self._loaded_memories):
            return copy(self._loaded_memories[index])
        return ConsensusMemory(self._ratio)

    def decide(
        self, keys: Sequence[Hashable], measured: Tensor, rule: Rule, max_norm_ratio: float | None
    ) -> Agreement:
        """Decide by the matrices where the rule is the consensus; any other is shown the gradients' Gramian."""
        unit = keys[0] if self._scope == "bucket" else None
        both = measured.view(2, -1, measured.shape[1])
        if self._scope == "running":
            self._matrices[keys[0]] = both
            both = torch.stack(list(self._matrices.values())).sum(0)
        if unit not in self._memories:
            self._memories[unit] = self._remembered(len(self._used) - 1)
        memory = self._memories[unit]
        remembered = _Remembered(memory, both[0], both[1])
        is_consensus = getattr(rule, "ratio", None) == self._ratio
        agreement = decide(both[1], remembered if is_consensus else rule, max_norm_ratio)
        self._last[unit] = both, agreement.voters
        found = remembered.found
        return agreement if found is None else replace(agreement, distance=found.z, flipped=found.flipped)

    def finish(self) -> None:
        """Remember the step, and draw in what is far out, or not finite, in the momenta."""
        self._momenta = {key: self._momenta[key] for key in self._used}
        self._matrices = {key: matrices for key, matrices in self._matrices.items() if key in self._used}
        for unit, (both, voters) in self._last.items():
            moves = self._memories[unit].decide(both[0], both[1], voters).moves
            if on_host(moves) and torch.equal(moves, torch.eye(len(moves), dtype=moves.dtype)):
                continue
            for key in [unit] if self._scope == "bucket" else self._used:
                self._momenta[key] = move(self._momenta[key], moves)
            for matrices in self._matrices.values():
                matrices[0] = move(move(matrices[0], moves).mT, moves)
        for _, voters in self._last.values():  # who broke down in this step may be well in the next
            for matrices in self._matrices.values():
                matrices[1].masked_fill_(~(voters[:, None] & voters[None, :]), 0)
        self._memories = {unit: memory for unit, memory in self._memories.items() if unit in self._last}
        self._last, self._used = {}, {}
        self._steps += 1
        if self._steps == 2:  # DDP has laid its buckets out
            self._loaded, self._loaded_memories = [], []

    def dump(self, columns: int) -> bytes:
        """Return memories, and momenta `(W, columns)`, in the order of the last buckets, as bytes without code.

        Momenta of slices have fewer columns, and other ranks have the rest of them.
        """
        file = io.BytesIO()
        memories = [memory.state_dict() for memory in self._memories.values() or self._loaded_memories]
        momenta = [m.cpu() for m in self._momenta.values() or self._loaded if m.shape[1] == columns]
        torch.save({"scope": self._scope, "momenta": momenta, "memories": memories}, file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        """Restore what `dump` returned; what belongs to another scope or world size begins anew.

        Raises:
            ValueError: content is something else; nothing is changed then.
        """
        try:
            found: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
            scope, momenta = found["scope"], found["momenta"]
            _require_matrices(momenta)
            memories = [ConsensusMemory(self._ratio) for _ in found["memories"]]
            for memory, each in zip(memories, found["memories"], strict=True):
                memory.load_state_dict(each)
        except Exception as error:
            raise ValueError(f"memory must be what state_dict() returned, found {content!r:.60}") from error
        if scope == self._scope:
            self._loaded, self._steps = momenta, 0
            if scope == "bucket":
                self._loaded_memories = memories
            elif memories:
                self._memories[None] = memories[0]


class _Remembered(Weighting):
    """The consensus rule with its memory, as a rule that the voters' guards can ask."""

    def __init__(self, memory: ConsensusMemory, momenta: Tensor, gradients: Tensor) -> None:
        self._memory, self._momenta, self._gradients = memory, momenta, gradients
        self.found: Consensus | None = None

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the weights `(W,)`."""
        self.found = self._memory.decide(self._momenta, self._gradients, present(gramian), remember=False)
        return self.found.weights

    def of_few(self, gramian: list[list[float]], voters: list[int]) -> dict[int, float]:
        """Return what each kept rank counts."""
        among = torch.tensor([i in voters for i in range(len(gramian))])
        self.found = self._memory.decide(self._momenta, self._gradients, among, remember=False)
        return {i: weight for i, weight in enumerate(self.found.weights.tolist()) if weight}

    def __repr__(self) -> str:
        """Return the rule's name."""
        return f"ConsensusAgreement(ratio={self._memory.ratio}) with its memory"


def _require_matrices(momenta: object) -> None:
    """Raise ValueError unless these are momenta, by bucket."""
    fine = isinstance(momenta, list) and all(
        isinstance(m, Tensor) and m.dim() == 2 and m.dtype in (torch.float32, torch.float64) for m in momenta
    )
    if not fine:
        raise ValueError(f"momenta must be matrices (W, k) in a list, found {momenta!r:.60}")
