import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.codecs import Rtn
from deltakeeper.errors import CodecError


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(delta, **settings):
    (term,) = Rtn(**settings).encode(delta, name="w")
    return term


def error(term, delta):
    return float((term.to_dense().double() - delta).norm() / delta.double().norm())


@pytest.mark.parametrize(("bits", "wanted", "within"), [(2, 0.550, 3e-3), (3, 0.237, 2e-3), (4, 0.111, 1e-3)])
def test_gaussian_oracle(bits, wanted, within):
    delta = gaussian(512, 1024) * 5e-4
    assert error(encode(delta, bits=bits), delta) == pytest.approx(wanted, abs=within)


def test_gaussian_oracle_of_eight_bits():
    delta = gaussian(512, 1024) * 5e-4
    assert error(encode(delta, bits=8), delta) == pytest.approx(0.0065, abs=5e-5)


def symmetric_loop(delta, bits, group):
    """The definition, entry by entry in float32."""
    decoded = np.zeros_like(delta)
    for i, row in enumerate(delta):
        for start in range(0, len(row), group):
            peak = max(abs(float(entry)) for entry in row[start : start + group])
            scale = np.float32(peak / (2 ** (bits - 1) - 0.5))
            for j in range(start, min(start + group, len(row))):
                code = round(float(row[j] / scale)) if scale else 0
                decoded[i, j] = scale * np.float32(min(max(code, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1))
    return decoded


def asymmetric_loop(delta, bits, group):
    decoded = np.zeros_like(delta)
    for i, row in enumerate(delta):
        for start in range(0, len(row), group):
            entries = [float(entry) for entry in row[start : start + group]]
            low, high = min(*entries, 0.0), max(*entries, 0.0)
            exact = (high - low) / (2**bits - 1)
            scale, zero = np.float32(exact), round(-low / exact) if exact else 0
            for j in range(start, min(start + group, len(row))):
                code = (round(float(row[j] / scale)) if scale else 0) + zero
                decoded[i, j] = scale * np.float32(min(max(code, 0), 2**bits - 1) - zero)
    return decoded


@pytest.mark.parametrize(("loop", "symmetric"), [(symmetric_loop, True), (asymmetric_loop, False)])
@pytest.mark.parametrize("group", [0, 7, 32])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_equal_a_plain_loop(loop, symmetric, group, bits):
    delta = gaussian(11, 70, seed=bits) * (gaussian(11, 70, seed=99) > -0.5)
    delta[3] = 0.0
    term = encode(delta, bits=bits, group=group, symmetric=symmetric, scale="float32")
    assert np.array_equal(term.to_dense().numpy(), loop(delta.numpy(), bits, group or 70))


def test_half_precision_scales_cost_next_to_nothing():
    delta = gaussian(64, 256)
    for bits in (3, 8):
        single, half = (error(encode(delta, bits=bits, scale=scale), delta) for scale in ("float32", "float16"))
        assert half == pytest.approx(single, rel=0.01)


def test_finer_groups_and_own_ranges_lower_the_error():
    delta = gaussian(128, 512) * torch.logspace(-2, 0, 512)
    errors = [error(encode(delta, group=group), delta) for group in (0, 128, 16)]
    assert errors == sorted(errors, reverse=True)
    shifted = gaussian(64, 256).abs()
    assert error(encode(shifted, symmetric=False), shifted) < 0.7 * error(encode(shifted), shifted)


@given(st.integers(1, 9), st.integers(1, 70), st.integers(2, 8), st.integers(0, 40), st.booleans(), st.booleans())
def test_bytes_are_known_beforehand(out, columns, bits, group, symmetric, half):
    codec = Rtn(bits=bits, group=group, symmetric=symmetric, scale="float16" if half else "float32")
    (term,) = codec.encode(gaussian(out, columns), name="w")
    assert codec.payload_bytes((out, columns)) == term.nbytes


def test_bits_per_weight():
    delta = gaussian(64, 1024)
    assert encode(delta, bits=3).nbytes == 64 * 1024 * (3 + 16 / 128) / 8 + 4
    assert encode(delta, bits=3, symmetric=False).nbytes == 64 * 1024 * (3 + 24 / 128) / 8 + 4


@given(st.integers(2, 8), st.booleans(), st.floats(0.1, 0.9))
def test_exact_zeros_stay_zero(bits, symmetric, share):
    delta = gaussian(8, 40)
    delta[torch.rand(delta.shape, generator=torch.Generator().manual_seed(1)) < share] = 0.0
    decoded = encode(delta, bits=bits, group=16, symmetric=symmetric).to_dense()
    assert not decoded[delta == 0].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 1}, "'bits'"), ({"bits": 9}, "'bits'"), ({"group": -1}, "'group'"), ({"scale": "bfloat16"}, "'scale'")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(CodecError, match=message):
        Rtn(**settings)


@pytest.mark.parametrize(("size", "message"), [(3.4e38, "leave float32"), (1e-45, "underflow")])
def test_deltas_at_the_ends_of_float32_are_refused(size, message):
    with pytest.raises(CodecError, match=f"'w' {message}"):
        encode(torch.tensor([[size, -size]]), bits=8 if size < 1 else 2)
