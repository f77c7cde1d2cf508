"""Held-out data on real ranks: what they say of ranks, and that reading them leaves training as it was."""

import copy
import inspect
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gaf_ddp import GAFState, filter_fsdp, filter_parameters, gaf_hook
from gaf_ddp.demo import points
from tests.checks.faults import error_of
from tests.marks import job_but
from tests.nets import assert_replicas_equal, batches, ddp, mlp

Ranks = Callable[..., list[Any]]
STEPS = 160


def shard(rank: int, cell: str) -> tuple[Tensor, Tensor]:
    """Return one rank's data where three of four have wrong labels, or where one has data of its own."""
    inputs, labels = points(1000, seed=100 + rank)
    if cell == "bad majority":
        return inputs, (labels + 1) % 10 if rank != 2 else labels
    own = labels >= 8
    return (inputs[own], labels[own]) if rank == 1 else (inputs[~own], labels[~own])


def network() -> nn.Sequential:
    """Return a small network, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10))


def model_of(engine: str, device: torch.device, settings: dict[str, Any]) -> tuple[Any, GAFState]:
    """Return a model in an engine, with the filter on it."""
    state, model = GAFState(**settings), network().to(device)
    if engine == "fsdp":
        fully_shard(model[0])
        fully_shard(model)
        return model, filter_fsdp(model, state)
    wrapped = ddp(model, device, bucket_cap_mb=0.005)
    if engine == "parameters":
        filter_parameters(model.parameters(), state)
    else:
        wrapped.register_comm_hook(state, gaf_hook)
    return wrapped, state


def train(device: torch.device, engine: str, cell: str, every: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank's data, held-out data read every so many steps; return accuracy and who was kept when."""
    rank = dist.get_rank()
    model, state = model_of(engine, device, settings)
    inputs, labels = shard(rank, cell)
    held = [each[rank::4].to(device) for each in points(200, seed=7)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order, kept = torch.Generator().manual_seed(rank), []
    inner = model.module if engine == "parameters" else model
    for step in range(STEPS):
        if every is not None and step % every == 0:
            state.reference(lambda temperature: cross_entropy(inner(held[0]) / temperature, held[1]))
        chosen = torch.randint(len(inputs), (16,), generator=order)
        optimizer.zero_grad()
        cross_entropy(model(inputs[chosen].to(device)), labels[chosen].to(device)).backward()
        optimizer.step()
        if engine == "parameters":
            state.advance()
        if state.agreement is not None:
            kept.append(state.agreement.kept.tolist())
    if engine != "fsdp":
        assert_replicas_equal(model)
    test, answers = points(2000, seed=1)
    with torch.no_grad():
        right = (model(test.to(device)).argmax(1).cpu() == answers).double().mean()
    return {
        "accuracy": 100 * float(right),
        "kept": torch.tensor(kept[-40:]).double().mean(0),
        "said": str(state.report()),
    }


@pytest.mark.parametrize(
    ("engine", "cell"),
    job_but(
        ("ddp", "data of its own"),
        of=[(e, c) for e in ("ddp", "fsdp", "parameters") for c in ("bad majority", "data of its own")],
    ),
    ids=str,
)
def test_held_out_data_find_a_bad_majority_and_an_honest_minority(ranks: Ranks, engine: str, cell: str) -> None:
    told = ranks(4, train, engine, cell, 10, {})[0]
    good = [2] if cell == "bad majority" else [0, 1, 2, 3]
    assert told["accuracy"] > 83
    assert (told["kept"][good] >= 0.9).all()
    assert (told["kept"][[rank for rank in range(4) if rank not in good]] <= 0.1).all()


@pytest.mark.job
@pytest.mark.parametrize("cell", ["bad majority", "data of its own"])
def test_without_held_out_data_these_are_lost(gloo_ranks: Ranks, cell: str) -> None:
    assert gloo_ranks(4, train, "ddp", cell, None, {})[0]["accuracy"] < 75


@pytest.mark.job
def test_engines_and_ballots_of_several_steps_say_the_same(gloo_ranks: Ranks) -> None:
    ddp_, fsdp = (gloo_ranks(4, train, engine, "bad majority", 10, {"judge_every": 1})[0] for engine in ("ddp", "fsdp"))
    assert torch.equal(ddp_["kept"], fsdp["kept"])
    every_fourth = gloo_ranks(4, train, "ddp", "bad majority", 10, {"judge_every": 4})[0]
    assert every_fourth["accuracy"] > 75


class Odd(nn.Module):
    """A network with running statistics, random numbers, and a layer that every second step leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(mlp(), nn.BatchNorm1d(5), nn.Dropout(0.3))
        self.head, self.other = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, uses_other: bool = True) -> Tensor:
        """Return logits."""
        hidden: Tensor = self.head(self.body(x))
        return hidden + self.other(hidden) if uses_other else hidden


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all that a reading must leave alone."""
    held = [state for each in optimizer.state.values() for state in each.values() if isinstance(state, Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    kept = [*model.parameters(), *gradients, *model.buffers(), *held, torch.get_rng_state()]
    return [(each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone() for each in kept]


# torch 2.15 gave it another name.
SYNCS_BUFFERS = "forward_sync_buffers"
if SYNCS_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    SYNCS_BUFFERS = "broadcast_buffers"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "no buffers": {SYNCS_BUFFERS: False},
    "views": {"gradient_as_bucket_view": True},
    "accumulating": {},
    "autocast": {},
    "joined": {},
    "fsdp": {},
    "parameters": {},
}


def read_between_steps(device: torch.device, kind: str, reads: bool) -> dict[str, Any]:
    """Train with everybody kept (watch), held-out data read between steps or not; return what came out."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model: Any = Odd().to(device)
    state = GAFState(watch=True)
    if kind == "fsdp":
        fully_shard(model.head)
        fully_shard(model)
        filter_fsdp(model, state)
    else:
        model = DistributedDataParallel(model, bucket_cap_mb=0.001, **KINDS[kind])
        if kind == "parameters":
            filter_parameters(model.parameters(), state)
        else:
            model.register_comm_hook(state, gaf_hook)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    changed, losses = 0, []

    def loss(x: Tensor, y: Tensor, uses_other: bool = True) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
            return cross_entropy(model(x, uses_other), y)

    def held(x: Tensor, y: Tensor) -> Tensor:
        if kind != "parameters":
            return loss(x, y)
        inner = model.module.eval()
        found = cross_entropy(inner(x), y)
        inner.train()
        return found

    def read(x: Tensor, y: Tensor) -> None:
        nonlocal changed
        if reads:
            before = everything(model, optimizer)
            state.reference(lambda t: held(x.flip(0), y.flip(0)) / t)
            changed += sum(not torch.equal(*pair) for pair in zip(before, everything(model, optimizer), strict=True))

    def steps() -> None:
        for index, (x, y) in enumerate(batches(rank, 6 + rank * (kind == "joined"))):
            optimizer.zero_grad()
            if kind == "accumulating":
                with model.no_sync():
                    loss(x, y).backward()
                read(x, y)  # in the midst of a step, whose gradients wait
            value = loss(x, y, index % 2 == 0 or kind != "unused")
            losses.append(float(value.detach()))
            value.backward()
            optimizer.step()
            if kind == "parameters":
                state.advance()
            read(x, y)

    if kind == "joined":
        with Join([model]):
            steps()
    else:
        steps()
    found = {"changed": changed, "losses": losses, "after": everything(model, optimizer)}
    return {**found, "told": state.agreement is not None and state.agreement.trusted is not None}


@pytest.mark.parametrize("kind", job_but("plain", of=list(KINDS)))
def test_a_reading_leaves_training_as_it_was(gloo_ranks: Ranks, kind: str) -> None:
    for read, plain in zip(*(gloo_ranks(2, read_between_steps, kind, reads) for reads in (True, False)), strict=True):
        assert read["changed"] == 0
        assert read["losses"] == plain["losses"]
        assert all(torch.equal(*pair) for pair in zip(read["after"], plain["after"], strict=True))
        assert (read["told"], plain["told"]) == (True, False)


def read_on_some(device: torch.device, readers: list[int]) -> str:
    """Return what comes out of steps between which some ranks read held-out data."""
    model, state = model_of("ddp", device, {})
    inputs, labels = (each[:16] for each in shard(dist.get_rank(), "data of its own"))

    def steps() -> None:
        for step in range(4):
            if step == 1 and dist.get_rank() in readers:
                state.reference(lambda t: cross_entropy(model(inputs) / t, labels))
            cross_entropy(model(inputs), labels).backward()
        state.summary()

    return error_of(steps)


def test_a_reading_on_some_ranks_is_an_error_on_all(gloo_ranks: Ranks) -> None:
    said = gloo_ranks(3, read_on_some, [0, 2])
    rule = "state.reference must be called on every rank, between the same steps"
    assert all(f"{rule}, found it called on ranks [0, 2] and not on ranks [1]" in each for each in said)
    assert gloo_ranks(3, read_on_some, [0, 1, 2]) == ["nothing"] * 3


def save_and_go_on(device: torch.device) -> list[Tensor]:
    """Return who counts after more readings, of a state that goes on, and of one that a checkpoint was loaded into."""
    return [_go_on(device, resumes) for resumes in (False, True)]


def _go_on(device: torch.device, resumes: bool) -> Tensor:
    model, state = model_of("ddp", device, {"judge_every": 1})
    inputs, labels = shard(dist.get_rank(), "bad majority")
    held = points(64, seed=7)
    for step in range(100):
        if step == 52:
            file = io.BytesIO()
            torch.save(state.state_dict(), file)
            if resumes:
                held_model = copy.deepcopy(model.module)
                model, state = model_of("ddp", device, {"judge_every": 1})
                model.module.load_state_dict(held_model.state_dict())
                file.seek(0)
                state.load_state_dict(torch.load(file, weights_only=True))
                model.zero_grad()
        if step % 5 == 1:
            state.reference(lambda t, model=model: cross_entropy(model(held[0]) / t, held[1]))  # type: ignore[misc]
        chosen = slice(10 * step, 10 * step + 10)
        model.zero_grad()
        cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    assert state.agreement is not None
    assert state.agreement.condemned is not None
    return torch.stack([state.agreement.kept, state.agreement.condemned])


@pytest.mark.job
def test_verdicts_go_on_after_a_checkpoint(gloo_ranks: Ranks) -> None:
    for whole, resumed in gloo_ranks(4, save_and_go_on):
        assert torch.equal(whole, resumed)
        assert whole[1].any()


def test_what_is_no_loss_is_refused(gloo_ranks: Ranks) -> None:
    state = GAFState()
    with pytest.raises(TypeError, match="loss must be callable, from a temperature to the loss, found 3"):
        state.reference(3)  # type: ignore[arg-type]
    state.reference(lambda t: torch.zeros(()))  # before the first step nothing is read
    with pytest.raises(ValueError, match="reference is for the consensus rule"):
        GAFState(tau=0.9).reference(lambda t: torch.zeros(()))
    said = gloo_ranks(1, wrong_losses)[0]
    assert said[0].startswith("loss(temperature) must return one number with a gradient, found a tensor of")
    assert "was the model called under no_grad?" in said[1]


def wrong_losses(device: torch.device) -> list[str]:
    """Return what is said of losses that are none."""
    model, state = model_of("ddp", device, {})
    inputs = points(8, seed=0)[0]
    model(inputs).sum().backward()

    def without_gradient(temperature: float) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(inputs).sum()
        return found

    said = []
    for loss in (lambda t: model(inputs), without_gradient):
        with pytest.raises(TypeError) as error:
            state.reference(loss)
        said.append(str(error.value))
    return said


def read_nothing(device: torch.device) -> list[str]:
    """Read held-out data of which one rank has none; return what this rank warns of."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gaf_ddp.ballots").addHandler(handler)
    model, state = model_of("ddp", device, {})
    inputs, labels = (each[:16] for each in shard(0, "data of its own"))
    held = [each[: 0 if dist.get_rank() == 2 else 16] for each in points(16, seed=7)]
    for _ in range(6):
        cross_entropy(model(inputs), labels).backward()
        state.reference(lambda t: cross_entropy(model(held[0]) / t, held[1]))
    assert state.report().has_held_out
    return said


def test_an_empty_share_is_told_once(gloo_ranks: Ranks) -> None:
    said = "gaf_ddp: the held-out loss of rank 2 is nan, and its share does not count: has it any examples?"
    assert gloo_ranks(3, read_nothing) == [[], [], [said]]
