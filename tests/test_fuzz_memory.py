"""Whatever comes step after step, and whatever a checkpoint holds: the consensus rule's memory, and a state's."""

import copy
import io
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaf_ddp import GAFState
from gaf_ddp.ballots.judge import Judge
from gaf_ddp.rules.memory import MOMENTUM, ConsensusMemory
from tests.fuzz import fuzzed, make, unless_rounding_decides
from tests.properties import gramian_of
from tests.rules.consensus_oracle import ConsensusOracle, Step
from tests.test_state import filled

LENGTH = 30
PRESENT = ("plain",) * 12 + ("negated", "tenfold")  # copies tie, and a move of momenta rounds
ABSENT = ("zeros", "nan", "inf")


class History(list[Tensor]):
    """Gradients by step, shown as what they were made from."""

    recipe: object = None

    def __repr__(self) -> str:
        """Return the recipe."""
        return f"History{self.recipe}"


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Return some steps' gradients `(W, n)`: at any scale, and each rank may be absent, far or a copy in each."""
    world_size, exponent = draw(st.integers(1, 20)), draw(st.integers(-30, 30))
    common, seed = draw(st.sampled_from([0.3, 1.0, 10.0])), draw(st.integers(0, 2**16))
    kinds = st.lists(st.sampled_from(PRESENT + ABSENT), min_size=world_size, max_size=world_size)
    by_step = draw(st.lists(kinds, min_size=1, max_size=6))
    steps = [make(k, LENGTH, torch.float64, exponent, common, seed + i) for i, k in enumerate(by_step)]
    history = History(steps)
    history.recipe = by_step, exponent, common, seed
    return history


def voters_of(rows: Tensor) -> Tensor:
    """Return whose gradient is finite and not zero."""
    return rows.isfinite().all(1) & rows.any(1)


def remember(history: list[Tensor], memory: ConsensusMemory) -> list[tuple[list[int], Tensor, Tensor]]:
    """Return who was kept, z, and the momenta after each step."""
    found, momenta, kept = [], torch.zeros_like(history[0]), torch.ones(len(history[0]), dtype=torch.bool)
    for rows in history:
        voters = voters_of(rows)
        gradients = torch.where(voters[:, None], rows, 0)
        momenta = MOMENTUM * momenta + gradients
        judged = memory.judge(gramian_of(momenta), gramian_of(gradients), voters)
        momenta = judged.moves @ momenta
        good = torch.where(judged.z.isnan(), kept, judged.z <= 3) & ~judged.flipped
        kept = good if (good & voters).any() else kept
        found.append((kept.nonzero().flatten().tolist(), judged.z, momenta))
    return found


@fuzzed(25)
@given(histories())
def test_steps_are_those_of_explicit_vectors(history: list[Tensor]) -> None:
    def expect() -> list[tuple[Step, Tensor]]:
        by_hand = ConsensusOracle(len(history[0]), LENGTH)
        return [(by_hand.step(rows), by_hand.momenta - by_hand.mean) for rows in history]

    expected = unless_rounding_decides(expect)
    largest = max(rows[rows.isfinite()].abs().max().item() for rows in history if rows.isfinite().any())
    found = remember(history, ConsensusMemory())
    for (kept, z, momenta), (step, their_momenta) in zip(found, expected, strict=True):
        assert kept == step.kept
        torch.testing.assert_close(z, torch.tensor(step.z).double(), rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(momenta, their_momenta, rtol=1e-6, atol=1e-6 * largest)


@fuzzed(15)
@given(histories(), st.integers(0, 5))
def test_a_judge_that_is_saved_in_between_goes_on(history: list[Tensor], when: int) -> None:
    """With its momenta and all, to the bit."""
    outcomes = []
    for restarts in (False, True):
        judge = Judge(3.0, MOMENTUM)
        for step, rows in enumerate(history * 2):
            voters = voters_of(rows)
            products = judge.tally(torch.where(voters[:, None], rows, 0).float(), 1)
            opinion = judge.judge(products, voters, 1)
            if restarts and step == when:
                content = judge.dump()
                judge = Judge(3.0, MOMENTUM)
                judge.load(content)
        outcomes.append(opinion)
    assert outcomes[0].by_held_out is outcomes[1].by_held_out is None  # nobody has read held-out data
    for one, other in zip(outcomes[0][:-1], outcomes[1][:-1], strict=True):
        assert torch.equal(one.double().nan_to_num(9), other.double().nan_to_num(9))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=3) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
tensors = st.builds(
    torch.full,
    st.lists(st.integers(0, 3), max_size=4),
    st.just(1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.int64, torch.bool, torch.complex64]),
)


@fuzzed(60)
@given(
    st.sampled_from(
        ["version", "step", "totals", "memory", "totals.kept", "totals.cosine", "history", "reset.kept", "new"]
    ),
    anything,
)
def test_a_state_refuses_what_it_did_not_save_and_stays_as_it_was(where: str, value: Any) -> None:
    state = filled()
    before, found = state.state_dict(), copy.deepcopy(state.state_dict())
    outer, _, inner = where.partition(".")
    (found[outer] if inner else found)[inner or outer] = value
    refuses(state, found, before)


@fuzzed(40)
@given(st.integers(0, 2**30), st.integers(0, 7), st.booleans())
def test_a_state_lives_on_flipped_and_cut_bytes(place: int, bit: int, is_cut: bool) -> None:
    state = GAFState()
    before, found = state.state_dict(), trained(GAFState()).state_dict()
    memory = bytearray(found["memory"])
    place %= len(memory)
    memory[place] ^= 1 << bit
    found["memory"] = bytes(memory[:place] if is_cut else memory)
    if not refuses(state, found, before):
        trained(state)


@fuzzed(80)
@given(
    st.none() | tensors | anything,
    st.none() | tensors | anything,
    tensors | anything,
    tensors | anything,
)
def test_a_state_lives_on_any_memory_that_it_takes(momenta: Any, moves: Any, kept: Any, cosines: Any) -> None:
    state, file = GAFState(), io.BytesIO()
    torch.save({"momenta": momenta, "moves": moves, "kept": kept, "cosines": cosines}, file)
    before = state.state_dict()
    if not refuses(state, {**before, "memory": file.getvalue()}, before):
        trained(state)
        state.state_dict()


def refuses(state: GAFState, found: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether the state raised ValueError, and is as it was then; nothing else may come."""
    try:
        state.load_state_dict(found)
    except ValueError:
        assert repr(state.state_dict()) == repr(before)
        return True
    return False


def trained(state: GAFState) -> GAFState:
    """Return the state after two steps of its judge over three ranks."""
    judge = state._judge
    assert judge is not None
    for step in range(2):
        rows = make(["plain"] * 3, 20, torch.float32, seed=step)
        opinion = judge.judge(judge.tally(rows, 1), voters_of(rows), 1)
        assert opinion.kept.any()
    return state
