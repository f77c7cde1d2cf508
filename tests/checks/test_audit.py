"""Audits: one flipped bit is named, wherever it is; healthy ranks never are; nothing is different afterwards."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gaf_ddp import GAFState, audit, gaf_hook
from gaf_ddp.monitor.report import AuditReport, RankAudit
from tests.checks.faults import error_of, flip
from tests.marks import job_but
from tests.nets import batches, ddp, mlp

Ranks = Callable[..., list[Any]]


def network() -> nn.Module:
    """Return a network with running statistics and random numbers: in to (., 12), out (., 5)."""
    return nn.Sequential(mlp(), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 5))


def flipped(x: Tensor, bit: int = 22) -> Tensor:
    """Return x with one bit of its second element flipped: by default the highest of the mantissa."""
    return flip(x.detach().cpu(), 1, bit).to(x.device)


def audit_with_faults(device: torch.device) -> dict[str, dict[str, Any]]:
    """Return what audits say: of sound ranks, and with one bit flipped on rank 1 at each place."""
    torch.manual_seed(dist.get_rank())  # ranks' own random numbers, which an audit does not use
    model, rank = ddp(network(), device), dist.get_rank()
    ((inputs, labels),) = batches(rank, 1, 5 + rank)  # of unlike sizes
    batch = (inputs.to(device), labels.to(device))

    def ask(**options: Any) -> dict[str, Any]:
        report = audit(model, lambda x, y: cross_entropy(model(x), y), batch, **options)
        return {**report.as_dict(), "said": str(report), "raised": error_of(report.require_equal)}

    found = {"sound": ask()}
    layer = model.module[0][2]
    if rank == 1:
        handle = layer.weight.register_hook(flipped)
    found["gradient"] = ask()
    if rank == 1:
        handle.remove()
        handle = layer.register_forward_hook(lambda module, x, y: y + (flipped(y, 31) - y).detach())
    found["activation"] = ask()
    if rank == 1:
        handle.remove()
        with torch.no_grad():
            layer.weight.copy_(flipped(layer.weight))
    found["weight"] = ask()
    if rank == 2:
        with torch.no_grad():
            layer.weight[0, 0] = torch.nan
    found["nobody alike"] = ask()
    return found


def test_one_flipped_bit_is_named(ranks: Ranks) -> None:
    host = socket.gethostname()
    outcomes = ranks(3, audit_with_faults)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    found = outcomes[0]
    sound = found.pop("sound")
    assert (sound["said"], sound["raised"]) == ("the same gradient on all 3 ranks", "nothing")
    alone = found.pop("nobody alike")
    assert alone["said"].endswith("; no majority, relative to rank 0")
    assert [rank["equal"] for rank in alone["ranks"]] == [True, False, False]
    assert "off by inf" in alone["said"]
    assert sorted(found) == ["activation", "gradient", "weight"]
    for place, report in found.items():
        assert [rank["equal"] for rank in report["ranks"]] == [True, False, True], place
        assert 0 < report["ranks"][1]["difference"] < 1
        assert report["said"].startswith(f"rank 1 ({host}) off by ")
        assert report["raised"] == f"gradients of one batch must be the same on every rank, found {report['said']}"
    assert found["gradient"]["ranks"][1]["parameter"] == "module.0.2.weight"


def everything(model: nn.Module) -> list[Tensor]:
    """Return what an audit must leave alone."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    kept = [*model.parameters(), *gradients, *model.buffers(), torch.get_rng_state()]
    return [tensor.detach().clone() for tensor in kept]


def audit_between_steps(device: torch.device, audits: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Train with the filter, with audits between steps or without; return what came out, what audits changed."""
    model, rank = ddp(network(), device, **options), dist.get_rank()
    state = GAFState()
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    changed, reports = 0, []
    for inputs, labels in batches(rank, 4):
        batch = (inputs.to(device), labels.to(device))
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        if audits:
            before, needs_sync = everything(model), model.require_forward_param_sync
            reports.append(audit(model, lambda x, y: cross_entropy(model(x), y), batch).equal)
            after = everything(model)
            changed += sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            changed += needs_sync != model.require_forward_param_sync
        optimizer.step()
    trained = torch.cat([tensor.flatten().double() for tensor in everything(model)]).cpu()
    return {"changed": changed, "reports": reports, "trained": trained, "steps": state.step}


@pytest.mark.parametrize(
    "options", job_but({}, of=[{}, {"find_unused_parameters": True}, {"static_graph": True}]), ids=str
)
def test_nothing_is_different_afterwards(gloo_ranks: Ranks, options: dict[str, Any]) -> None:
    with_audits, without = (gloo_ranks(2, audit_between_steps, audits, options) for audits in (True, False))
    for audited, plain in zip(with_audits, without, strict=True):
        assert (audited["changed"], audited["reports"]) == (0, [True] * 4)
        assert audited["steps"] == plain["steps"] == 4
        assert torch.equal(audited["trained"], plain["trained"])


def audit_often(device: torch.device, count: int) -> int:
    """Return how many of so many audits of healthy ranks, between steps, said that gradients differ."""
    model, rank, alarms = ddp(network(), device), dist.get_rank(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for inputs, labels in batches(rank, count):
        batch = (inputs.to(device), labels.to(device))
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        alarms += not audit(model, lambda x, y: cross_entropy(model(x), y), batch).equal
    return alarms


def test_healthy_ranks_are_never_named(ranks: Ranks) -> None:
    assert ranks(2, audit_often, 50) == [0, 0]


def fail_in_a_step(device: torch.device) -> list[str]:
    """Return what an audit says whose step fails on rank 1, and what the next one says."""
    model = ddp(mlp(), device)

    def step(fails: bool) -> Tensor:
        if fails and dist.get_rank() == 1:
            raise LookupError("no such layer")
        loss: Tensor = model(torch.ones(3, 12, device=device)).sum()
        return loss

    return [error_of(lambda fails=fails: audit(model, lambda: step(fails))) for fails in (True, False)]  # type: ignore[misc]


def test_a_step_that_fails_on_one_rank_ends_the_audit_on_all(ranks: Ranks) -> None:
    expected = "step must succeed on every rank, found on rank 1 LookupError: no such layer"
    assert ranks(2, fail_in_a_step) == [[expected, "nothing"]] * 2


def test_a_report_is_plain() -> None:
    report = AuditReport(True, [RankAudit(0, "a", True, 0.0, None), RankAudit(1, "b", False, 0.5, "layer.weight")])
    assert str(report) == "rank 1 (b) off by 5.0e-01, most in layer.weight"
    assert report.as_dict()["equal"] is False
    assert report.as_dict()["ranks"][1] == {
        "rank": 1, "host": "b", "equal": False, "difference": 0.5, "parameter": "layer.weight"
    }  # fmt: skip
