"""Buckets that DDP leaves out, as nobody used their parameters: a step ends also when its last one never comes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaf_ddp import GAFState, gaf_hook, skip_on_disagreement
from tests.accelerator import take_accelerators_way
from tests.nets import assert_replicas_equal, ddp

Ranks = Callable[..., list[Any]]

LAYERS = 5  # a bucket each; DDP sends the last one first
LEFT_OUT = [set(), {0}, {LAYERS - 1}, {0, LAYERS - 1}, {1, 2}, {0, 1, 2, 3}, {1, 2, 3, 4}, set(), {0}, {0}]
SETTINGS: list[dict[str, Any]] = [
    *(
        {"tau": 2.0, "scope": scope, "exchange": exchange}
        for scope in ("bucket", "model")
        for exchange in ("auto", "gather")
    ),
    {},
    {"watch": True},
]


class Detours(nn.Module):
    """Layers of which a step may leave out some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor, left_out: set[int]) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i not in left_out:
                x = layer(x).tanh()
        return x


def gradients_of(model: nn.Module, x: Tensor, left_out: set[int]) -> list[Tensor | None]:
    model.zero_grad()
    model(x, left_out).square().sum().backward()
    return [p.grad for p in model.parameters()]


def train(device: torch.device, settings: dict[str, Any]) -> None:
    """Take a step for each of LEFT_OUT, and compare its gradients with plain DDP's."""
    options = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True, "bucket_cap_mb": 0.0005}
    model = ddp(Detours(), device, **options)
    plain = ddp(copy.deepcopy(model.module), device, **options)
    state = GAFState(**settings)
    model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_on_disagreement(optimizer, state)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step, left_out in enumerate(LEFT_OUT):
        x = torch.randn(3, 12, generator=generator).to(device)
        found, expected = gradients_of(model, x, left_out), gradients_of(plain, x, left_out)
        assert state.step == step + 1
        if "tau" in settings:
            used = [p for i, p in enumerate(model.parameters()) if i not in left_out]
            decided = [p for decision in state.decisions for p in decision.parameters]
            assert {id(p) for p in decided} == {id(p) for p in used}
            assert len(state.decisions) == (1 if state.scope == "model" else len(used))
        if "tau" in settings or settings.get("watch"):
            for mine, theirs in zip(found, expected, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    torch.testing.assert_close(mine, theirs)
        optimizer.step()
        assert_replicas_equal(model)
        plain.load_state_dict(model.state_dict())
    assert state.summary()["gaf/skipped_fraction"] == 0


def train_all(device: torch.device, as_accelerator: bool) -> None:
    if as_accelerator:
        take_accelerators_way()
    for settings in SETTINGS:
        train(device, settings)


def test_a_step_ends_also_without_its_last_bucket(ranks: Ranks) -> None:
    ranks(2, train_all, False)


def test_so_it_does_on_the_accelerators_way(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, train_all, True)
