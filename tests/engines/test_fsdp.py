"""filter_fsdp against torch's own fully_shard: what it averages, and whom it leaves out."""

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW

from gaf_ddp import GAFState, Mean, NeighborhoodAgreement, filter_fsdp, skip_on_disagreement
from tests.accelerator import take_accelerators_way
from tests.engines.fsdp_models import (
    SIZES,
    Checks,
    Probes,
    count,
    gradients_of,
    network,
    parameters_of,
    probes,
    run,
    split,
    train,
)
from tests.gradients import agreeing_gradients
from tests.marks import job_but
from tests.syncs import HostSyncs

Ranks = Callable[..., list[Any]]
Make = Callable[[], GAFState]

AVERAGES: dict[str, Make] = {
    "slices": partial(GAFState, weighting=Mean()),
    "gather": partial(GAFState, weighting=Mean(), exchange="gather"),
    "sketch": partial(GAFState, weighting=Mean(), exchange="sketch"),
    "watch": partial(GAFState, watch=True),
    "before start_step": partial(GAFState, tau=0.0, start_step=9),
}
FILTERS: dict[str, Make] = {
    "tau": partial(GAFState, tau=0.5),
    "tau, sketch": partial(GAFState, tau=0.5, exchange="sketch"),
    "tau, gather": partial(GAFState, tau=0.5, exchange="gather"),
}
WAYS: dict[str, dict[str, Any]] = {  # to use fully_shard
    "default": {},
    "reduce in bfloat16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)},
    "reduce in float32": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    "reduce in float16": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float16)},
    "keep parameters": {"reshard_after_forward": False},
}


def assert_near(found: Tensor, expected: Tensor, to: float = 1e-6) -> None:
    """Assert equality relative to the largest element, or to 1."""
    assert (found - expected).abs().max() <= to * expected.abs().max().clamp(min=1)


def check_averages(way: str = "default", names: Iterable[str] = ("slices",)) -> None:
    """Averaging is torch's own, however it is judged and the model is sharded."""
    options, steps = WAYS[way], 2 if way == "default" else 1
    expected = train(network(**options), None, steps)
    for name in names:
        state = AVERAGES[name]()
        found = train(network(**options), state, steps)
        assert_near(found, expected, 2e-3 if way in ("reduce in bfloat16", "reduce in float16") else 1e-6)
        assert (state.step, len(state.decisions)) == (steps, 1 if name == "watch" else 4), (way, name)
    # Where all weights are 1/W gradients are scaled by 1, in any dtype.
    assert torch.equal(train(network(**options), AVERAGES["sketch"](), steps), expected), way


def check_every_way() -> None:
    """So it is in every way to judge, and to use fully_shard."""
    for way in WAYS:
        check_averages(way, AVERAGES if way == "default" else ["slices"])
    expected = train(network(), None, 1, divisor=5.0)
    for name in ("slices", "sketch"):
        assert_near(train(network(), AVERAGES[name](), 1, divisor=5.0), expected)


def spoilt(kind: str, bad: int, gradients: Tensor) -> Tensor:
    """Return everyone's gradients `(W, N)`, those of one rank spoilt."""
    row = gradients[bad]
    gradients[bad] = {"flipped": -row, "nan": row * torch.nan, "long": 1000 * row, "zero": 0 * row}[kind]
    return gradients


def check_bad_ranks() -> None:
    """A bad rank is left out in every unit, under every rule, and the result is the mean of the rest."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for kind in ["nan", "zero"] if size == 2 else ["flipped", "nan", "long", "zero"]:  # two cannot tell who is bad
        for name in FILTERS if kind == "nan" and size < 4 else ("tau",):
            bad = size - 1
            gradients = spoilt(kind, bad, agreeing_gradients(size, count()))
            rest = [i for i in range(size) if i != bad]
            model = probes()
            state = filter_fsdp(model, FILTERS[name]())
            model(gradients[rank]).backward()
            expected = gradients[rest].double().mean(0)
            assert_near(gradients_of(model), expected)
            assert state.agreement is not None
            assert state.agreement.kept.tolist() == [[i in rest for i in range(size)]] * len(SIZES), (kind, name)
            summary = state.summary()
            assert summary[f"gaf/kept_rank_{bad:02d}"] == 0, (kind, name)
            assert summary["gaf/nonfinite_fraction"] == (kind == "nan") / size, (kind, name)
    for state in (GAFState(), GAFState(tau=0.5)):
        model = probes()
        filter_fsdp(model, state)
        model(torch.full((count(),), torch.nan)).backward()
        assert gradients_of(model).isnan().all()  # so that a loss scale backs off


def check_one_step_late(mesh: Any = None) -> None:
    """The consensus rule leaves out who is turned from the second step on, and who has no gradient at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for kind in ("flipped", "nan", "zero", "long"):
        bad, model = size - 1, probes() if mesh is None else probes(mesh=mesh)
        rest = [i for i in range(size) if i != bad]
        state = filter_fsdp(model, GAFState())
        for step in range(4):
            gradients = agreeing_gradients(size, count(), step)
            if step or kind == "flipped":
                gradients = spoilt(kind, bad, gradients)
            model.zero_grad()
            model(gradients[rank]).backward()
            counted = rest if step else list(range(size))
            if not (kind == "long" and step == 1):  # shortened, once
                assert_near(gradients_of(model), gradients[counted].double().mean(0))
        assert state.step == 4
        assert state.agreement is not None
        assert state.agreement.kept.tolist() == [i in rest for i in range(size)], kind
        assert {id(p) for p in state.decisions[0].parameters} == {id(p) for p in model.parameters()}


def check_late_averages() -> None:
    """With everyone kept the gradients are torch's own, to the bit, in every way to use fully_shard."""
    for options in WAYS.values():
        expected = train(network(**options), None)
        state = GAFState()
        assert torch.equal(train(network(**options), state), expected)
        assert state.step == 2


def check_steps() -> None:
    """Steps are backwards that synchronise; decisions are of units that were used, with their parameters."""
    rank, size = dist.get_rank(), dist.get_world_size()
    gradients = agreeing_gradients(size, count())
    model = probes()
    state = filter_fsdp(model, GAFState(weighting=Mean()))
    model.set_requires_gradient_sync(False)
    model(gradients[rank]).backward()
    assert (state.step, state.agreement) == (0, None)
    model.set_requires_gradient_sync(True)
    model(2 * gradients[rank]).backward()
    assert state.step == 1
    assert_near(gradients_of(model), 3 * gradients.double().mean(0))
    model(gradients[rank]).backward()
    assert state.step == 2
    assert_near(gradients_of(model), 4 * gradients.double().mean(0))
    decided = {id(parameter) for decision in state.decisions for parameter in decision.parameters}
    assert decided == {id(parameter) for parameter in model.parameters()}
    model.zero_grad()
    model(gradients[rank], 1).backward()
    assert (state.step, len(state.decisions)) == (3, len(SIZES) - 1)
    assert [p.grad is None for p in model.inner.parameters()] == [False, False, True]
    model.zero_grad()
    (model(gradients[rank]) + model(gradients[rank])).backward()
    assert state.step == 4
    assert_near(gradients_of(model), 2 * gradients.double().mean(0))


def check_two_roots() -> None:
    """A step is one where no unit holds all others."""
    model = Probes()
    for unit in model.inner:
        fully_shard(unit)
    state = filter_fsdp(model, GAFState(tau=2.0))
    model(agreeing_gradients(1, count())[0]).backward()
    assert (state.step, len(state.decisions)) == (1, len(model.inner))
    state.summary()
    model(agreeing_gradients(1, count())[0]).backward()
    assert (state.step, len(state.decisions)) == (2, len(model.inner))


def check_compiled() -> None:
    """A compiled model's gradients are filtered too."""
    expected = train(network(), None)
    model = network()
    state = GAFState(weighting=Mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        model.compile(backend="eager")
        assert_near(train(model, state), expected)
    assert state.step == 2


def check_skip() -> None:
    """What nothing agreed on is not stepped: no momentum, no decay, no step count."""
    rank = dist.get_rank()
    model, twin = probes(), probes()
    state = filter_fsdp(model, GAFState(tau=0.5))
    filter_fsdp(twin, GAFState(tau=2.0))
    optimizer, reference = (AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, twin))
    skip_on_disagreement(optimizer, state)
    turned = 1 - 2 * (rank % 2) * torch.cat([torch.ones(sum(SIZES[0])), torch.zeros(count() - sum(SIZES[0]))])
    for step, disagree in enumerate([True, False, True]):
        gradient = agreeing_gradients(1, count(), step)[0]
        for m, adam in ((model, optimizer), (twin, reference)):
            adam.zero_grad()
            m((turned if disagree else 1) * gradient).backward()
        if disagree:
            for p in twin.inner[0].parameters():
                p.grad = None
        optimizer.step()
        reference.step()
        assert state.agreement is not None
        assert (~state.agreement.agreed).sum() == disagree
    assert torch.equal(parameters_of(model), parameters_of(twin))


def check_memory() -> None:
    """What the rule remembers of a state goes into another, and on from there to the bit."""
    rank, size = dist.get_rank(), dist.get_world_size()
    states, models = [GAFState(), GAFState()], [probes(), probes()]
    for state, model in zip(states, models, strict=True):
        filter_fsdp(model, state)
    for step in range(6):
        gradients = agreeing_gradients(size, count(), step)
        if step == 3:
            states[1].load_state_dict(copy.deepcopy(states[0].state_dict()))
        for model in models[: 1 if step < 3 else 2]:
            model.zero_grad()
            model(gradients[rank]).backward()
    first, second = ([decision.agreement.distance for decision in state.decisions] for state in states)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert states[1].step == 6
    assert torch.equal(gradients_of(models[0]), gradients_of(models[1]))


def check_hosts_vote() -> None:
    """Ranks of one host have one vote; here all are of one, so everyone counts."""
    model = network()
    state = GAFState(voters="host")
    assert_near(train(model, state), train(network(), None))


def replicated() -> Any:
    """Return a mesh of two replicas of two shards."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def check_replicas() -> None:
    """With replicas all ranks vote."""
    mesh, rank = replicated(), dist.get_rank()
    for way, name in (("default", "gather"), ("default", "watch"), ("reduce in float16", "sketch")):
        expected = train(network(mesh=mesh, **WAYS[way]), None)
        assert_near(train(network(mesh=mesh, **WAYS[way]), AVERAGES[name]()), expected)
    for bad in (0, 3):
        gradients = spoilt("flipped", bad, agreeing_gradients(4, count()))
        model = probes(mesh=mesh)
        state = filter_fsdp(model, FILTERS["tau, gather"]())
        model(gradients[rank]).backward()
        rest = [i for i in range(4) if i != bad]
        assert_near(gradients_of(model), gradients[rest].double().mean(0))
        assert state.agreement is not None
        assert state.agreement.kept.tolist() == [[i in rest for i in range(4)]] * 3
    check_one_step_late(mesh)
    with pytest.raises(ValueError, match=r"exchange must be 'sketch' or 'gather' where fully_shard has replicas"):
        filter_fsdp(probes(mesh=mesh), GAFState(tau=0.5))
    half: Any = dist.new_group([0, 1]), dist.new_group([2, 3])
    with pytest.raises(ValueError, match=r"process_group must have the model's ranks \[0, 1, 2, 3\], found \["):
        filter_fsdp(probes(mesh=mesh), GAFState(half[rank // 2]))
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match=r"sharded over more than one rank, found replicas alone at the root"):
        filter_fsdp(probes(mesh=alone), GAFState())


def check_part_of_the_world() -> None:
    """A model on half of the ranks is filtered among these."""
    rank = dist.get_rank()
    mesh = replicated()["shard"]
    model = probes(mesh=mesh)
    state = filter_fsdp(model, GAFState(mesh.get_group(), tau=0.5))
    gradient = agreeing_gradients(1, count())[0]
    model(-gradient if rank == 3 else gradient).backward()  # two of which one is turned do not agree
    assert torch.equal(gradients_of(model), (gradient if rank < 2 else 0 * gradient).double())
    assert state.agreement is not None
    assert state.agreement.agreed.tolist() == [rank < 2] * len(SIZES)


class Counted:
    """A reduce-scatter of a user."""

    def __init__(self) -> None:
        self.calls = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool) -> Any:
        self.calls += 1
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return reduce_scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


def check_wraps_another_reduce_scatter() -> None:
    """Sketches leave gradients to the unit's own reduce-scatter; slices are all that travels otherwise."""
    expected = train(network(), None)
    for exchange, calls in (("sketch", 8), ("sharded", 0)):
        model, counted = network(), Counted()
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_custom_reduce_scatter(counted)  # type: ignore[arg-type]
        found = train(model, GAFState(weighting=Mean(), exchange=exchange))  # type: ignore[arg-type]
        assert_near(found, expected)
        assert counted.calls == calls


AS_TORCH: Checks = [
    check_every_way,
    check_late_averages,
    check_compiled,
    check_wraps_another_reduce_scatter,
    check_hosts_vote,
]
FILTERED: dict[int, Checks] = {
    2: [check_bad_ranks, check_steps, check_two_roots, check_skip, check_memory],
    3: [check_averages, check_bad_ranks, check_one_step_late, check_steps, check_memory],
    4: [check_bad_ranks, check_one_step_late, check_replicas, check_part_of_the_world],
}


def test_averages_are_torchs(gloo_ranks: Ranks) -> None:
    gloo_ranks(2, run, AS_TORCH)


@pytest.mark.parametrize("size", job_but(2, of=FILTERED))
def test_units_are_filtered(gloo_ranks: Ranks, size: int) -> None:
    gloo_ranks(size, run, FILTERED[size])


def judge_alone(device: torch.device) -> None:
    with pytest.warns(UserWarning, match=r"gaf_ddp: world size 1"):
        state = filter_fsdp(network(), GAFState())
    model = network()
    seen: list[Tensor] = []
    model[0].set_all_reduce_hook(seen.append)
    state = GAFState(tau=0.5)
    assert torch.equal(train(model, state), train(network(), None))
    assert (state.step, len(seen)) == (2, 2)
    assert state.agreement is not None
    assert state.agreement.weights.tolist() == [[1.0]] * 4


def test_one_rank_passes_unchanged(gloo_ranks: Ranks) -> None:
    gloo_ranks(1, judge_alone)


def count_syncs(device: torch.device) -> list[list[str]]:
    """Return what waits for the device in a plain backward, and in filtered ones by sketches and by slices."""
    take_accelerators_way()
    calls = []
    rules: list[GAFState | None] = [None, GAFState(), GAFState(weighting=NeighborhoodAgreement(0.5))]
    for state in rules:
        model = probes()
        if state is not None:
            filter_fsdp(model, state)
        gradients = agreeing_gradients(2, count())
        for _ in range(2):  # the first compares the settings
            if state is not None:
                state._catch_up()  # which on accelerators reads pinned memory, written behind the last step
            loss = model(gradients[dist.get_rank()])
            with HostSyncs() as syncs:
                loss.backward()
        calls.append(syncs.calls)
        assert (gradients_of(model) - 2 * gradients.double().mean(0)).abs().max() <= 1e-5
    return calls


def test_on_accelerators_nothing_waits_for_the_device(gloo_ranks: Ranks) -> None:
    for plain, *filtered in gloo_ranks(2, count_syncs):
        assert filtered == [plain, plain]


def test_the_parts_of_the_probes_are_the_units() -> None:
    assert [len(part) for part in split(torch.zeros(count()))] == [sum(sizes) for sizes in SIZES]
