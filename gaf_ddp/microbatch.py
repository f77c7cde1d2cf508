"""The paper's own set-up: the filter over micro-batches that follow each other in one process."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from gaf_ddp.rules.sequential import SequentialAgreement


class MicrobatchFilter:
    """The paper's sequential rule (arXiv 2412.18052, algorithm 1), streaming over micro-batches.

        micro = MicrobatchFilter(model.parameters(), tau=0.97)
        for inputs, targets in micro_batches:
            criterion(model(inputs), targets).backward()
            micro.accumulate()
        if micro.finish():
            optimizer.step()
        optimizer.zero_grad()

    Equal to `SequentialAgreement(tau, running)` over the micro-batches' gradients. Each micro-batch counts the
    same, whatever its size; one with a NaN, infinite or zero gradient does not count at all.

    Memory: one copy of the gradient, float32 for half precision parameters. `accumulate` never waits for the
    device; `finish` does, once.

    Args:
        parameters: the model's; frozen ones and those without a gradient take no part.
        tau: largest cosine distance to the running combination, in [0, 2].
        running: `"mean"`, the paper's; `"half"`, the authors' released code, which keeps `(v + g) / 2`.

    Raises:
        ValueError: a setting is out of its range, or there is no parameter to train.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        tau: float = 1.0,
        *,
        running: Literal["mean", "half"] = "mean",
    ) -> None:
        rule = SequentialAgreement(tau, running)
        self.tau, self.running, self._factor = rule.tau, rule.running, rule.factor
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise ValueError("parameters must hold at least one that requires a gradient, found none")
        self._device = self._parameters[0].device
        self.overflowed = False
        self._combined: dict[int, Tensor] = {}  # v, by parameter; the sum of the kept for "mean"
        self._kept = self._voters = self._nonfinite = self._zero()

    @torch.no_grad()
    def accumulate(self) -> None:
        """Fold the gradients of the backward before this call in, if they agree, and clear them.

        Raises:
            RuntimeError: no parameter has a gradient.
        """
        gradients = [(i, p.grad) for i, p in enumerate(self._parameters) if p.grad is not None]
        if not gradients:
            raise RuntimeError("accumulate() must follow a backward(), found no parameter with a gradient")
        square = self._sum([_inner(g, g) for _, g in gradients])
        against = self._sum([_inner(g, self._combined[i]) for i, g in gradients if i in self._combined])
        length = (square * self._sum([_inner(v, v) for v in self._combined.values()])).sqrt()
        distance = 1 - torch.where(length > 0, against / length, 0).clamp(-1, 1)
        voter = square.isfinite() & (square > 0)
        first = self._kept == 0
        keep = voter & (first | (distance <= self.tau))
        factor = torch.where(keep & ~first, self._factor, 1.0)
        self._fold(gradients, keep, factor)
        self._kept = self._kept + keep
        self._voters = self._voters + voter
        self._nonfinite = self._nonfinite + ~square.isfinite()
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def finish(self) -> bool:
        """Leave the filtered gradient in `p.grad`, start anew, and return whether to step: one host sync.

        Where fewer than two of two or more micro-batches agreed, every `p.grad` is None. Where none was finite,
        `overflowed` is true and every `p.grad` is NaN: under a GradScaler call `scaler.step(optimizer)` then too,
        so that it backs off.

        Raises:
            RuntimeError: nothing was accumulated.
        """
        if not self._combined:
            raise RuntimeError("finish() must follow at least one accumulate(), found none")
        kept, voters, nonfinite = torch.stack([self._kept, self._voters, self._nonfinite]).tolist()
        self.overflowed = voters == 0 and nonfinite > 0
        agreed = bool(kept >= 2 or (voters < 2 and not self.overflowed))
        divisor = float("nan") if self.overflowed else max(kept, 1) if self.running == "mean" else 1
        if agreed or self.overflowed:
            for i, v in self._combined.items():
                self._parameters[i].grad = v.div_(divisor).to(self._parameters[i].dtype)
        self._combined = {}
        self._kept = self._voters = self._nonfinite = self._zero()
        return agreed

    def _fold(self, gradients: list[tuple[int, Tensor]], keep: Tensor, factor: Tensor) -> None:
        """Set v to `factor · (v + g)` where kept; where not, v stays and g is never multiplied."""
        for i, gradient in gradients:
            if i not in self._combined:
                self._combined[i] = torch.zeros_like(gradient, dtype=_wide(gradient))
            here = keep.to(gradient.device)
            self._combined[i].add_(torch.where(here, gradient, 0))
        for v in self._combined.values():
            v.mul_(factor.to(v.device, v.dtype))

    def _sum(self, scalars: list[Tensor]) -> Tensor:
        if not scalars:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([s.to(self._device) for s in scalars]).sum()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self._device)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product as a float64 scalar, whatever the memory formats."""
    return (a.to(_wide(a)) * b.to(_wide(b))).sum(dtype=torch.float64)
