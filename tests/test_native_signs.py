"""Every version of the compiled passes gives the same bits, and those bits are right."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.layouts.bits import pack_bits, unpack_bits
from deltakeeper.native import load_library, merge_signs, native_status, pack_signs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(load_library() is None, reason=native_status())


def pair(rows, columns, dtypes, seed=0, spread=1e-3):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator) * 0.02
    moved = base + spread * torch.randn(rows, columns, generator=generator)
    moved = torch.where(torch.rand(rows, columns, generator=generator) < 0.3, base, moved)
    return base.to(dtypes[0]), moved.to(dtypes[1])


@compiled
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 64, 127])
def test_all_versions_give_the_same_bits(dtypes, columns):
    base, tuned = pair(5, columns, dtypes)
    for minus in (False, True):
        best, *others = (pack_signs(tuned, base, minus=minus, version=v) for v in ("best", "scalar", "numpy"))
        for other in others:
            for field in ("words", "present", "absolute", "square", "nonzero"):
                assert np.array_equal(np.asarray(getattr(best, field)), np.asarray(getattr(other, field))), field


@pytest.mark.parametrize("version", ["best", "numpy"])
def test_signs_and_sums_equal_their_definition(version):
    base, tuned = pair(7, 45, (torch.bfloat16, torch.bfloat16))
    delta = tuned.float() - base.float()
    found = pack_signs(tuned, base, version=version)
    assert torch.equal(found.words, pack_bits(delta >= 0))
    assert torch.equal(found.present, pack_bits(delta != 0))
    assert torch.equal(pack_signs(tuned, base, minus=True, version=version).words, pack_bits(delta > 0))
    np.testing.assert_allclose(found.absolute, delta.double().abs().sum(1), rtol=1e-14)
    np.testing.assert_allclose(found.square, delta.double().square().sum(1), rtol=1e-14)
    assert found.nonzero.tolist() == torch.count_nonzero(delta, dim=1).tolist()


def test_nan_and_infinity_show_in_the_sums():
    tuned = torch.zeros(3, 40)
    tuned[1, 3], tuned[2, 39] = float("nan"), float("-inf")
    assert np.isfinite(pack_signs(tuned).absolute).tolist() == [True, False, False]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["tensor", "row", "column"])
@pytest.mark.parametrize("masked", [False, True])
def test_merging_equals_a_float32_sum_rounded_once(dtype, axis, masked):
    rows, columns = 6, 77
    base, _ = pair(rows, columns, (dtype, dtype))
    generator = torch.Generator().manual_seed(3)
    bits = [torch.rand(rows, columns, generator=generator) < 0.5 for _ in range(3)]
    present = torch.rand(rows, columns, generator=generator) < 0.6
    shape = {"tensor": (1,), "row": (rows, 1), "column": (1, columns)}[axis]
    scales = [torch.rand(shape, generator=generator) * 10.0 ** (-2 - k) for k in range(3)]
    total = torch.zeros(rows, columns)
    for plane, scale in zip(bits, scales, strict=True):
        total = total + torch.where(plane, scale, -scale) * (present if masked else 1)
    words, mask = [pack_bits(plane) for plane in bits], pack_bits(present) if masked else None
    for version in ("best", "scalar"):
        out = torch.empty(rows, columns, dtype=dtype)
        assert merge_signs(words, scales, axis, mask, base, out, version=version)
        assert torch.equal(out, (total + base.float()).to(dtype)), version
        alone = torch.empty(rows, columns)
        assert merge_signs(words, scales, axis, mask, None, alone, version=version)
        assert torch.equal(alone, total), version


@compiled
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70))
@settings(max_examples=200)
def test_rounding_is_that_of_torch(values):
    base = torch.tensor([values])
    for dtype in (torch.bfloat16, torch.float16):
        for version in ("best", "scalar"):
            out = torch.empty(base.shape, dtype=dtype)
            assert merge_signs([pack_bits(base > 0)], [torch.zeros(1)], "tensor", None, base, out, version=version)
            assert torch.equal(out, (base + 0.0).to(dtype))


@compiled
@given(st.integers(0, 2**16 - 1))
@settings(max_examples=300)
def test_halves_widen_as_in_torch(bits):
    half = torch.tensor([[bits]], dtype=torch.int32).to(torch.int16).view(torch.float16)
    out = torch.empty(1, 1)
    for version in ("best", "scalar"):
        merge_signs(
            [torch.zeros(1, 1, dtype=torch.int32)], [torch.zeros(1)], "tensor", None, half, out, version=version
        )
        assert torch.equal(out.isnan(), half.isnan())
        assert out.isnan().all() or torch.equal(out, half.float())


def test_packed_signs_are_what_the_layout_unpacks():
    _, tuned = pair(4, 50, (torch.float32, torch.float32))
    assert torch.equal(unpack_bits(pack_signs(tuned).words, 50), tuned >= 0)


def test_the_library_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("DELTAKEEPER_NATIVE", "0")
    load_library.cache_clear()
    try:
        assert load_library() is None
        assert "DELTAKEEPER_NATIVE" in native_status()
        assert not merge_signs([], [], "tensor", None, None, torch.empty(1, 1))
    finally:
        monkeypatch.delenv("DELTAKEEPER_NATIVE")
        load_library.cache_clear()
