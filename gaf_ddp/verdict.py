"""One decision and the averages by it, in one launch where the device and W allow."""

from collections.abc import Callable

import torch
from torch import Tensor

from gaf_ddp.agreement import Agreement, decide
from gaf_ddp.gramian import Rows, combine, kernels


class Verdict:
    """`decide` and `combine` over one Gramian; the decision is taken when something first asks for it.

    Args: as `decide`'s; what that raises comes out of the first use.
    """

    def __init__(
        self, gramian: Tensor, weighting: Callable[[Tensor], Tensor], max_norm_ratio: float | None
    ) -> None:
        self._case = gramian, weighting, max_norm_ratio
        self._agreement: Agreement | None = None

    @property
    def agreement(self) -> Agreement:
        """The record of the decision."""
        if self._agreement is None:
            self._agreement = decide(*self._case)
        return self._agreement

    @property
    def weights(self) -> Tensor:
        """Each rank's share of the result, `(W,)`."""
        return self.agreement.weights

    def combine(self, rows: Rows, out: Tensor | None = None) -> Tensor:
        """Return `combine(rows, weights, out)`; on a GPU with few ranks the first call decides too."""
        gramian, weighting, _ = self._case
        if out is None:
            out = torch.empty_like(rows[0])
        fused = kernels(gramian.device.type, "_triton_decision") if self._agreement is None else None
        if (
            fused is not None
            and isinstance(rows, Tensor)
            and fused.can_decide_and_combine(gramian, weighting, rows, out)
        ):
            self._agreement = Agreement(gramian, *fused.decide_and_combine(*self._case, rows, out))
            return out
        return combine(rows, self.weights, out)
