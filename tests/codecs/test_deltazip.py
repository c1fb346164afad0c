import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import DeltaZip, Inputs
from deltakeeper.codecs.pruning import row_steps, two_of_four
from deltakeeper.errors import CodecError
from deltakeeper.layouts.bits import unpack_bits
from deltakeeper.testing import check_layout


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, tokens=None, seed=1):
    tokens = 4 * columns if tokens is None else tokens
    x = gaussian(tokens, columns, seed=seed) * torch.linspace(2, 0.05, columns) @ gaussian(columns, columns, seed=7)
    return Inputs(x.T @ x / tokens, x.mean(0), tokens)


def encode(codec, delta, inputs=None):
    (term,) = codec.encode(delta, name="w", inputs=inputs)
    return term


def weighted(error, inputs):
    error, gram = error.double(), inputs.gram.double()
    return math.sqrt(float(((error @ gram) * error).sum()))


def textbook(delta, gram, bits, keep, block, damp=0.01):
    """SparseGPT with rounding, entry by entry; `keep` None is 2:4."""
    work = delta.double().numpy().copy()
    out, columns = work.shape
    hessian = 2 * gram.double().numpy()
    for j in range(columns):
        if hessian[j, j] == 0:
            work[:, j] = 0
    steps = [2 * max(abs(work[i, j]) for j in range(columns)) / (2**bits - 1) for i in range(out)]
    hessian += damp * np.trace(hessian) / columns * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    done, pruned = np.zeros_like(work), np.zeros(work.shape, dtype=bool)
    for j in range(columns):
        if keep is None and j % 4 == 0:
            for i in range(out):
                group = range(j, min(j + 4, columns))
                order = sorted(group, key=lambda k: work[i, k] ** 2 / factor[k, k] ** 2)
                for k in order[: max(0, len(group) - 2)]:
                    pruned[i, k] = True
        elif keep is not None and j % block == 0:
            places = [(i, k) for i in range(out) for k in range(j, min(j + block, columns))]
            places.sort(key=lambda p: work[p] ** 2 / factor[p[1], p[1]] ** 2)
            for place in places[: len(places) - math.ceil(keep * len(places))]:
                pruned[place] = True
        for i in range(out):
            if not pruned[i, j] and steps[i]:
                code = min(max(round(work[i, j] / steps[i]), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
                done[i, j] = steps[i] * code
            error = (work[i, j] - done[i, j]) / factor[j, j]
            for k in range(j + 1, columns):
                work[i, k] -= error * factor[j, k]
    return torch.from_numpy(done).float()


@pytest.mark.parametrize("keep", [None, 0.45])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("columns", [24, 135])
def test_the_paper_entry_by_entry(columns, bits, keep):
    delta, inputs = gaussian(6, columns), correlated(columns)
    inputs.gram[5], inputs.gram[:, 5] = 0, 0
    codec = DeltaZip(bits=bits) if keep is None else DeltaZip(pattern="unstructured", keep=keep, bits=bits)
    wanted = textbook(delta, inputs.gram, bits, keep, 128)
    torch.testing.assert_close(encode(codec, delta, inputs).to_dense(), wanted, rtol=1e-5, atol=1e-5)
    assert not wanted[:, 5].any()


@pytest.mark.parametrize("keep", [None, 0.3])
def test_without_inputs_it_is_magnitude_and_plain_rounding(keep):
    delta = gaussian(9, 50)
    codec = DeltaZip() if keep is None else DeltaZip(pattern="unstructured", keep=keep)
    wanted = textbook(delta, torch.eye(50), 4, keep, 50)
    torch.testing.assert_close(encode(codec, delta).to_dense(), wanted)
    for inputs in (Inputs(torch.zeros(50, 50), torch.zeros(50), 9), Inputs(torch.eye(50), torch.zeros(50), 9)):
        if keep is None or not inputs.gram.any():
            torch.testing.assert_close(encode(codec, delta, inputs).to_dense(), wanted)


@pytest.mark.parametrize(("pattern", "keep"), [("2:4", 0.5), ("unstructured", 0.5)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [20, 400])
def test_paying_losses_back_lowers_the_error_of_the_output(pattern, keep, bits, tokens):
    delta, inputs = gaussian(40, 96), correlated(96, tokens)
    codec, plain = (DeltaZip(pattern, keep, bits, calibrated=on) for on in (True, False))
    found, base = (encode(c, delta, inputs).to_dense() - delta for c in (codec, plain))
    assert weighted(found, inputs) < (0.6 if tokens < 96 else 0.95) * weighted(base, inputs)
    assert codec.uses_inputs
    assert not plain.uses_inputs


def test_where_losses_cannot_be_paid_back_it_is_plain_pruning():
    delta, inputs = gaussian(40, 96), correlated(96, 400)
    codec = DeltaZip("unstructured", keep=0.05)
    assert torch.equal(encode(codec, delta, inputs).to_dense(), encode(codec, delta).to_dense())


@pytest.mark.parametrize(("bits", "bpw"), [(4, 3), (3, 2.5), (2, 2)])
@pytest.mark.parametrize("inputs", [None, correlated(256)])
def test_two_of_four_cost_half_the_bits_and_one(bits, bpw, inputs):
    term = encode(DeltaZip(bits=bits), gaussian(64, 256), inputs)
    assert term.nbytes == 64 * 256 * bpw / 8 + 4 * 64
    assert term.nbytes == DeltaZip(bits=bits).payload_bytes((64, 256))


@given(st.integers(1, 9), st.integers(1, 41), st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_any_width_keeps_two_of_each_four(out, columns, bits, weigh, seed):
    delta = gaussian(out, columns, seed=seed)
    codec = DeltaZip(bits=bits)
    term = encode(codec, delta, correlated(columns) if weigh else None)
    check_layout(term)
    assert term.nbytes == codec.payload_bytes((out, columns)) == codec.expected_bytes((out, columns))
    kept = torch.nn.functional.pad(unpack_bits(term.mask, columns).int(), (0, -columns % 4)).view(out, -1, 4).sum(2)
    wanted = [min(2, columns - start) for start in range(0, columns, 4)]
    assert (kept == torch.tensor(wanted)).all()


@given(st.integers(1, 6), st.integers(1, 13), st.integers(0, 99))
def test_the_two_largest_of_four_with_ties_to_the_first(out, columns, seed):
    values = gaussian(out, columns, seed=seed).round().numpy()
    found = two_of_four(values)
    for row, chosen in zip(values, found, strict=True):
        for start in range(0, columns, 4):
            group = range(start, min(start + 4, columns))
            best = sorted(group, key=lambda k: (-abs(row[k]), k))[:2]
            assert [k for k in group if chosen[k]] == sorted(best)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_tries_all_shares(bits):
    matrix = gaussian(5, 60)
    matrix[3] = 0
    found = row_steps(matrix, bits, search=True)
    for row, step in zip(matrix.double().tolist(), found.tolist(), strict=True):
        widest = 2 * max(map(abs, row)) / (2**bits - 1)
        errors = {}
        for i in range(80):
            tried = widest * (1 - i / 100)
            codes = [min(max(round(v / (tried or 1)), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for v in row]
            errors[tried] = sum(abs(c * tried - v) ** 2.4 for c, v in zip(codes, row, strict=True))
        assert step == pytest.approx(min(errors, key=errors.get), rel=1e-6)
    assert row_steps(matrix, bits, search=False).tolist() == pytest.approx(
        [2 * max(map(abs, row)) / (2**bits - 1) for row in matrix.tolist()]
    )


def test_the_search_helps_few_bits():
    delta = gaussian(50, 200)
    plain, best = (encode(DeltaZip(bits=2, search=search), delta).to_dense() for search in (False, True))
    assert float((best - delta).norm()) < 0.9 * float((plain - delta).norm())


@settings(max_examples=20)
@given(st.floats(0.01, 1), st.integers(0, 99))
def test_nothing_that_rounds_to_zero_is_stored(keep, seed):
    delta = gaussian(12, 130, seed=seed)
    delta[:, :60] *= 1e-3
    codec = DeltaZip(pattern="unstructured", keep=keep)
    term = encode(codec, delta, correlated(130))
    assert term.nnz == int((term.to_dense() != 0).sum())
    assert term.nnz <= sum(math.ceil(keep * 12 * width) for width in (128, 2))
    assert term.nbytes <= codec.expected_bytes((12, 130)) + 4 + 12 * 4 * 5
    assert codec.payload_bytes((12, 130)) is None


@pytest.mark.parametrize("std", [1e-8, 1e30])
def test_the_scale_of_the_delta_does_not_matter(std):
    delta, inputs = gaussian(12, 40), correlated(40)
    codec = DeltaZip(pattern="unstructured")
    factor = 2.0 ** round(math.log2(std))
    wanted = encode(codec, delta, inputs).to_dense() * factor
    assert torch.equal(encode(codec, delta * factor, inputs).to_dense(), wanted)


def test_rows_without_entries_stay_zero():
    delta = gaussian(5, 40)
    delta[2] = 0
    for inputs in (None, correlated(40)):
        assert not encode(DeltaZip(), delta, inputs).to_dense()[2].any()


def test_bad_calibration_and_settings_are_refused():
    with pytest.raises(CodecError, match="does not fit a matrix of 8 columns"):
        encode(DeltaZip(), gaussian(3, 8), correlated(9))
    with pytest.raises(CodecError, match="not finite"):
        encode(DeltaZip(), gaussian(3, 8), Inputs(torch.full((8, 8), torch.nan), torch.zeros(8), 1))
    with pytest.raises(CodecError, match="steps of 'w' leave float32"):
        encode(DeltaZip(), torch.full((3, 8), 3.4e38))
    with pytest.raises(CodecError, match="steps of 'w' leave float32"):
        encode(DeltaZip(), torch.full((3, 8), 1e-45))
    with pytest.raises(CodecError, match="pattern=unstructured"):
        DeltaZip(keep=0.4)
    with pytest.raises(CodecError, match="at least 2"):
        DeltaZip(bits=1)
