"""The public names and how they are called: changing either breaks users."""

import inspect
import subprocess
import sys

import pytest
import torch

import gaf_ddp
from gaf_ddp.rules.agreement import decide

NAMES = {
    "Agreement": "(gramian, cosine, weights, kept, agreed, voters, nonfinite, overlong, distance=None, flipped=None, "
    "equal=None, trusted=None, condemned=None, finished=None)",
    "AgreementLog": "(state, *targets, every=100, cosine_every=1000, rank=0)",
    "ConsensusAgreement": "(ratio=3.0)",
    "GAFState": "(process_group=None, tau=None, *, weighting=None, scope=None, exchange='auto', start_step=0, "
    "wire_dtype=None, max_norm_ratio=10.0, momentum=0.99, judge_every=None, sketch_size=4096, watch=False, "
    "voters='rank', check_every=None, max_consecutive_skips=None, replica_group=None)",
    "Mean": "()",
    "MicrobatchFilter": "(parameters, tau=1.0, *, running='mean')",
    "NeighborhoodAgreement": "(tau)",
    "SequentialAgreement": "(tau, running='mean')",
    "Weighting": "()",
    "attach": "(model, optimizer=None, *, state=None, mesh=None, **settings)",
    "audit": "(model, step, batch=(), group=None)",
    "check_replicas": "(model, optimizer=None, group=None)",
    "combine": "(rows, weights, out=None)",
    "filter_average": "(tensors, state, process_group=None)",
    "filter_fsdp": "(model, state)",
    "filter_gradients": "(rows, weighting)",
    "filter_parameters": "(parameters, state, process_group=None, advance_with=None)",
    "gaf_hook": "(state, bucket)",
    "gram": "(rows)",
    "skip_on_disagreement": "(optimizer, state)",
}


def test_the_public_names_are_these() -> None:
    assert sorted(gaf_ddp.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_frozen(name: str) -> None:
    signature = inspect.signature(getattr(gaf_ddp, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)) == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_public_names_say_what_they_are(name: str) -> None:
    assert (getattr(gaf_ddp, name).__doc__ or "").strip()


MEMBERS = {
    "Agreement": "agreed condemned cosine distance equal finished flipped gramian kept nonfinite overlong stack "
    "trusted voters weights",
    "AgreementLog": "cosine_every every rank state step",
    "ConsensusAgreement": "ratio",
    "GAFState": "advance agreement check_every decisions exchange judge_every load_state_dict max_consecutive_skips "
    "max_norm_ratio momentum process_group reference replica_group report scope sketch_size start_step state_dict step "
    "summary tau voters watch weighting wire_dtype",
    "Mean": "",
    "MicrobatchFilter": "accumulate finish overflowed running tau",
    "NeighborhoodAgreement": "tau",
    "SequentialAgreement": "factor running tau",
    "Weighting": "",
}


def test_public_members_are_these() -> None:
    instances: list[object] = [
        decide(torch.eye(2), gaf_ddp.Mean(), None),
        gaf_ddp.AgreementLog(gaf_ddp.GAFState()),
        gaf_ddp.ConsensusAgreement(),
        gaf_ddp.GAFState(),
        gaf_ddp.Mean(),
        gaf_ddp.MicrobatchFilter([torch.ones(2, requires_grad=True)]),
        gaf_ddp.NeighborhoodAgreement(1.0),
        gaf_ddp.SequentialAgreement(1.0),
        gaf_ddp.Weighting(),
    ]
    for instance in instances:
        members = {name for name in {**vars(type(instance)), **vars(instance)} if not name.startswith("_")}
        assert sorted(members) == MEMBERS[type(instance).__name__].split()
    assert sorted(MEMBERS) == sorted(name for name in NAMES if name[0].isupper())


@pytest.mark.job
def test_importing_the_package_starts_nothing() -> None:
    # No process group, no CUDA context, no thread, and none of the tests' peers.
    code = (
        "import gaf_ddp, sys, threading, torch; assert threading.active_count() == 1; "
        "assert not torch.cuda.is_initialized(); assert not torch.distributed.is_initialized(); "
        "assert 'torchjd' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
