"""The hash of replicas' bits: what it sees."""

import pytest
import torch
from torch import Tensor

from gaf_ddp.kernels.hash import hash_bits
from tests.checks.faults import flip
from tests.syncs import HostSyncs

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


def hashed(*tensors: Tensor | None) -> int:
    return int(hash_bits(tensors, CPU))


class TestHash:
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(0))  # two rows and a rest

    def test_sees_every_bit_of_an_element_wherever_it_is(self) -> None:
        seen = {hashed(self.x)}
        for index in (0, 1, 4095, 4096, 8192, 10_000):
            for bit in range(32):
                seen.add(hashed(flip(self.x, index, bit)))
        assert len(seen) == 1 + 6 * 32

    @pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 4096), (3, 8195), (5, 10_000)])
    def test_sees_elements_swapped_negated_and_zeros_of_another_sign(self, i: int, j: int) -> None:
        swapped, negated, zeros, signed = self.x.clone(), self.x.clone(), self.x.clone(), self.x.clone()
        swapped[[i, j]] = self.x[[j, i]]
        negated[[i, j]] *= -1
        zeros[[i, j]] = 0.0
        signed[[i, j]] = -0.0
        assert len({hashed(each) for each in (self.x, swapped, negated, zeros, signed)}) == 5

    def test_sees_tensors_swapped_missing_and_moved(self) -> None:
        a, b = self.x[:5000], self.x[5000:]
        assert len({hashed(a, b), hashed(b, a), hashed(a), hashed(a, None, b), hashed(None, a, b), hashed()}) == 6

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sees_all_dtypes_and_shapes(self, dtype: torch.dtype) -> None:
        x = (3 * torch.randn(3, 7, generator=torch.Generator().manual_seed(1))).to(dtype)
        y = x.clone()
        y[1, 2] = ~y[1, 2] if dtype == torch.bool else y[1, 2] + 1
        assert hashed(x) == hashed(x.clone()) == hashed(x.mT.contiguous().mT)
        assert hashed(x) != hashed(y)
        assert hashed(torch.zeros(0, dtype=dtype)) == hashed(None)

    def test_sees_nan_and_never_waits(self) -> None:
        x = self.x.clone()
        x[7] = torch.nan
        with HostSyncs() as syncs:
            of_nan = hash_bits([x, None], CPU)
        assert syncs.calls == []
        assert int(of_nan) == hashed(x.clone(), None) != hashed(self.x, None)
