"""Sums of terms and base as the specification has them."""

import torch

from deltakeeper.layouts import Dense
from deltakeeper.manifest import TensorRecord, TermRecord
from deltakeeper.reconstruct import merge_block, reconstruct

SHAPE = (4, 5)


def test_a_base_in_float64_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    delta = torch.randn(SHAPE, generator=generator) * 1e-3
    record = TensorRecord(SHAPE, "F64", "linear", "terms", "w", SHAPE, terms=(TermRecord("dense", {}),))
    terms = [Dense(SHAPE, "delta", delta)]
    wanted = (base.float() + delta).double()
    assert torch.equal(reconstruct(record, terms, base, None, torch.float64), wanted)
    assert torch.equal(merge_block(terms, base[1:3], slice(1, 3), torch.float64), wanted[1:3])
