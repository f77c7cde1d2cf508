"""Steps with given gradients under DDP and the hook, to be compared with the oracle afterwards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gaf_ddp import GAFState, gaf_hook
from tests import oracle
from tests.nets import Probe, assert_replicas_equal, ddp, flat_gradients


class Followed(NamedTuple):
    """What one rank saw. `spans[s]` are the elements of each decision of step s."""

    gradients: Tensor  # (steps, N) float64, after the hook
    spans: list[list[list[int]]]
    kept: list[Tensor]  # (decisions, W) bool, each step
    summary: dict[str, float]


def follow(
    device: torch.device,
    gradients: Tensor,
    sizes: list[int],
    settings: dict[str, Any],
    options: dict[str, Any] | None = None,
    by_hook: Callable[[GAFState, Any], torch.futures.Future[Tensor]] = gaf_hook,
) -> Followed:
    """Take SGD steps whose gradients `(steps, W, N)` are given; replicas must have the same bits after each."""
    probe = Probe(sizes).to(device)
    model = ddp(probe, device, **(options or {}))
    state = GAFState(**settings)
    buckets: list[list[Tensor]] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations other than its own
        buckets.append(bucket.parameters())
        return by_hook(state, bucket)

    model.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    filtered, spans, kept = [], [], []
    for step, of_ranks in enumerate(gradients):
        optimizer.zero_grad()
        model(of_ranks[dist.get_rank()].to(device)).backward()
        filtered.append(flat_gradients(probe).cpu())
        optimizer.step()
        if not filtered[-1].isnan().any():
            assert_replicas_equal(probe)
        assert state.step == step + 1
        decided = buckets if state.scope != "model" else [[p for bucket in buckets for p in bucket]]
        spans.append([_elements(probe, parameters) for parameters in decided])
        decided_on = [_elements(probe, d.parameters) for d in state.decisions]
        if state.scope == "model":  # one step late they are in the order in which they first came
            assert [sorted(elements) for elements in decided_on] == [sorted(elements) for elements in spans[-1]]
        else:
            assert decided_on == spans[-1]
        assert state.agreement is not None
        kept.append(state.agreement.kept.reshape(len(decided), -1).cpu())
        buckets.clear()
    return Followed(torch.stack(filtered), spans, kept, state.summary())


def assert_follows(
    outcomes: list[Followed],
    gradients: Tensor,
    rule: oracle.Rule,
    max_norm_ratio: float | None = 10.0,
    tolerance: float = 1e-4,
) -> None:
    """Assert that all ranks got the oracle's gradients, decision by decision."""
    first = outcomes[0]
    for other in outcomes[1:]:
        assert torch.equal(other.gradients.nan_to_num(9), first.gradients.nan_to_num(9))
    for of_ranks, filtered, spans, kept in zip(gradients, first.gradients, first.spans, first.kept, strict=True):
        assert sorted(i for span in spans for i in span) == list(range(len(filtered)))
        for span, who in zip(spans, kept, strict=True):
            expected = oracle.filtered(list(of_ranks[:, span]), rule, max_norm_ratio)
            assert who.nonzero().flatten().tolist() == expected.kept
            oracle.assert_close(filtered[span], expected.gradient, tolerance)


def _elements(probe: Probe, parameters: list[Tensor]) -> list[int]:
    """Return where these parameters are in the vector of all gradients."""
    ends = torch.tensor([p.numel() for p in probe.parts]).cumsum(0).tolist()
    where = {id(p): range(end - p.numel(), end) for p, end in zip(probe.parts, ends, strict=True)}
    return [i for p in parameters for i in where[id(p)]]
