"""The figures of a decoded delta against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.fidelity import BLOCK, Sums, compare, summarise


def defined(true, decoded):
    d, e = true.double().flatten(), decoded.double().flatten()
    moving = d != 0
    return {
        "relative_error": float((e - d).norm() / d.norm()),
        "cosine": float(d @ e / (d.norm() * e.norm())),
        "norm_ratio": float(e.norm() / d.norm()),
        "rho": float(d @ e / (d @ d)),
        "sign_agreement": float((d.sign() == e.sign())[moving].double().mean()),
        "zero_fraction": float((~moving).double().mean()),
    }


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-15, 1e-4, 1.0, 1e4]), rows=st.sampled_from([1, 7, 3000]))
def test_figures_are_what_they_are_defined_to_be(seed, scale, rows):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(rows, 48, generator=generator) * scale
    true[torch.rand(true.shape, generator=generator) < 0.3] = 0.0
    decoded = (true + 0.5 * scale * torch.randn(true.shape, generator=generator)) * (true != 0)
    decoded[:, ::5] = 0.0
    found = summarise([compare(true, decoded)])
    for name, value in defined(true, decoded).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_tensors_add_up_to_one_and_blocks_leave_no_entry_out():
    true = torch.randn(3, BLOCK + 5, generator=torch.Generator().manual_seed(0))
    decoded = true.sign()
    whole, parts = compare(true, decoded), [compare(t, d) for t, d in zip(true, decoded, strict=True)]
    assert whole.entries == sum(p.entries for p in parts) == true.numel()
    assert summarise([whole]).cosine == pytest.approx(summarise(parts).cosine, rel=1e-6)
    assert summarise([whole]).sign_agreement == 1.0


@pytest.mark.parametrize(("decoded", "error"), [(0.0, 0.0), (1.0, math.inf)])
def test_a_delta_of_zeros_is_met_exactly_or_not_at_all(decoded, error):
    found = summarise([compare(torch.zeros(4, 4), torch.full((4, 4), decoded))])
    assert found.relative_error == error and found.zero_fraction == 1.0


def test_nothing_at_all_has_no_zeros():
    assert summarise([]).zero_fraction == 0.0
    assert summarise([Sums()]).relative_error == 0.0
