"""Whether Triton's kernels are used: where they compile, and where nobody has switched them off."""

from collections.abc import Iterator

import pytest
import torch

from gaf_ddp.runtime import device as devices


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Let `kernels` choose anew, and forget afterwards what it chose."""
    chosen = devices.kernels, devices._has_kernels
    for choice in chosen:
        choice.cache_clear()
    yield
    for choice in chosen:
        choice.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
class TestKernels:
    def test_are_used_where_they_compile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fused = pytest.importorskip("gaf_ddp.kernels.gram_triton")
        tried: list[torch.device] = []
        monkeypatch.setattr(fused, "probe", tried.append)
        assert devices.kernels("cuda", "gram_triton") is fused
        assert devices.kernels("cuda", "decide_triton") is not None
        assert tried == [torch.device("cuda")]  # once, for all of them
        assert devices.kernels("cpu", "gram_triton") is None

    def test_plain_torch_works_where_they_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fused = pytest.importorskip("gaf_ddp.kernels.gram_triton")

        def probe(device: torch.device) -> None:
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(fused, "probe", probe)
        with pytest.warns(UserWarning, match=r"Triton cannot compile here, plain torch .*find C compiler") as said:
            found = [devices.kernels("cuda", name) for name in ("gram_triton", "decide_triton")]
        assert found == [None, None]
        assert len(said) == 1

    def test_can_be_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GAF_DDP_TRITON", "0")
        assert devices.kernels("cuda", "gram_triton") is None
