"""The public names and how they are called: changing either breaks users."""

import inspect
import subprocess
import sys

import pytest

import gaf_ddp

NAMES = {
    "Agreement": "(gramian, cosine, weights, kept, agreed, voters, nonfinite, overlong)",
    "GAFState": "(process_group=None, tau=None, *, weighting=None, scope='bucket', exchange='auto', start_step=0, "
    "wire_dtype=None, max_norm_ratio=10.0, vote_momentum=0.0)",
    "Mean": "()",
    "MicrobatchFilter": "(parameters, tau=1.0, *, running='mean')",
    "NeighborhoodAgreement": "(tau)",
    "SequentialAgreement": "(tau, running='mean')",
    "Weighting": "()",
    "combine": "(rows, weights, out=None)",
    "filter_gradients": "(rows, weighting)",
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


def test_public_members_are_these() -> None:
    def members(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert members(gaf_ddp.GAFState) >= {"agreement", "summary", "state_dict", "load_state_dict"}
    assert members(gaf_ddp.MicrobatchFilter) == {"accumulate", "finish"}


def test_importing_the_package_starts_nothing() -> None:
    # No process group, no CUDA context, no thread, and none of the tests' peers.
    code = (
        "import gaf_ddp, sys, threading, torch; assert threading.active_count() == 1; "
        "assert not torch.cuda.is_initialized(); assert not torch.distributed.is_initialized(); "
        "assert 'torchjd' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
