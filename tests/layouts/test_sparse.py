"""The sparse layout: every kind of value with every kind of mask against scalar loops, and hostile payloads."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.errors import LayoutError
from deltakeeper.layouts import BitMask, GapMask, SeedMask, Sparse, TwoFourMask
from deltakeeper.layouts.bits import pack_bits, unpack_bits
from deltakeeper.layouts.philox import philox, philox_key
from deltakeeper.testing import check_layout

SHAPE = (6, 35)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_of_four(matrix):
    padded = torch.nn.functional.pad(matrix.abs() + 1, (0, -matrix.shape[1] % 4)).reshape(len(matrix), -1, 4)
    kept = torch.zeros_like(padded, dtype=torch.bool).scatter(2, padded.topk(2, dim=2).indices, True)
    return (
        kept.reshape(len(matrix), -1)[:, : matrix.shape[1]]
        & (padded.reshape(len(matrix), -1) > 0)[:, : matrix.shape[1]]
    )


def mask_of(kind, matrix):
    columns = matrix.shape[1]
    if kind == "seed":
        return SeedMask(2**64 - 1, "model.layers.0.w", 0.3)
    if kind == "seed-row":
        return SeedMask(7, "w", torch.linspace(0, 1, len(matrix)))
    if kind == "two_four":
        return TwoFourMask.from_words(pack_bits(two_of_four(matrix)), columns)
    words = pack_bits(matrix > 1)
    return BitMask(words) if kind == "bits" else GapMask.from_words(words, columns)


def term_of(values, kind, shape=SHAPE):
    matrix = numbers(*shape)
    mask = mask_of(kind, matrix)
    if values == "sign":
        return Sparse.from_signs(matrix, mask, 0.75)
    if values == "float16":
        return Sparse.from_matrix(matrix, mask, values)
    bits, scale = (4, torch.tensor([0.25])) if values == "int-tensor" else (3, numbers(shape[0], 1, seed=1).abs())
    codes = (matrix * 3).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    if values == "int-zero-point":
        return Sparse.from_codes((codes + 4).to(torch.uint8), scale, mask, bits=bits, zero_point=1)
    return Sparse.from_codes(codes, scale, mask, bits=bits)


MASK_KINDS = ("bits", "gaps", "two_four", "seed", "seed-row")
VALUE_KINDS = ("float16", "sign", "int-tensor", "int-row", "int-zero-point")


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("values", VALUE_KINDS)
def test_every_combination_keeps_the_contract(values, kind):
    check_layout(term_of(values, kind))


def test_an_empty_term_keeps_the_contract():
    nothing = torch.zeros(2, 3)
    for mask in (BitMask(pack_bits(nothing > 0)), GapMask.from_words(pack_bits(nothing > 0), 3)):
        for term in (
            Sparse.from_matrix(nothing, mask, "float16"),
            Sparse.from_signs(nothing, mask, 0.0),
            Sparse.from_codes(nothing.to(torch.int8), torch.ones(1), mask, bits=5),
        ):
            check_layout(term)
            assert not term.to_dense().any()


def stream_bits(words):
    return int.from_bytes(b"".join(struct.pack("<i", word) for word in words.tolist()), "little")


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("values", VALUE_KINDS)
def test_decoding_equals_the_scalar_definition(values, kind):
    term = term_of(values, kind)
    kept = unpack_bits(term.places.words(SHAPE), SHAPE[1])
    wanted, index = torch.zeros(SHAPE), 0
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            if not kept[row, column]:
                continue
            gain = term.gain.reshape(-1)[row if term.gain.numel() > 1 else 0]
            if values == "float16":
                value = term.values[index].float()
            else:
                code = stream_bits(term.values) >> index * term.bits & (1 << term.bits) - 1
                value = torch.tensor(float(2 * code - 1 if values == "sign" else code - term.zero_point))
            wanted[row, column] = value * gain
            index += 1
    assert index == term.nnz
    assert torch.equal(term.to_dense(), wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(2, 8), st.booleans(), st.data())
def test_codes_round_trip(out, columns, bits, by_row, data):
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    kept = torch.from_numpy(rng.random((out, columns)) < 0.4)
    signed = torch.from_numpy(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, columns)).astype(np.int8))
    scale = torch.from_numpy(rng.random((out, 1) if by_row else 1).astype(np.float32))
    term = Sparse.from_codes(signed, scale, pack_bits(kept), bits=bits)
    assert torch.equal(term.to_dense(), torch.where(kept, signed.float() * scale, 0.0))
    zero_point = data.draw(st.integers(0, 2**bits - 1))
    unsigned = (signed.short() + 2 ** (bits - 1)).to(torch.uint8)
    term = Sparse.from_codes(unsigned, scale, pack_bits(kept), bits=bits, zero_point=zero_point)
    assert torch.equal(term.to_dense(), torch.where(kept, (unsigned.float() - zero_point) * scale, 0.0))


def test_codes_that_are_not_kept_are_not_read():
    codes = torch.tensor([[1, 100], [-2, -100]], dtype=torch.int8)
    kept = torch.tensor([[True, False], [True, False]])
    assert Sparse.from_codes(codes, torch.ones(1), pack_bits(kept), bits=2).to_dense().tolist() == [[1, 0], [-2, 0]]
    with pytest.raises(LayoutError, match="does not fit 2 bits"):
        Sparse.from_codes(codes, torch.ones(1), pack_bits(~kept), bits=2)


def test_reading_does_not_depend_on_the_block_size(monkeypatch):
    terms = [term_of(values, kind) for values in VALUE_KINDS for kind in MASK_KINDS]
    whole = [term.to_dense() for term in terms]
    monkeypatch.setattr("deltakeeper.layouts.bits.BLOCK_ENTRIES", 70)
    monkeypatch.setattr("deltakeeper.layouts.streams._PIECE", 32)
    for term, dense in zip(terms, whole, strict=True):
        again = Sparse.from_tensors(term.shape, term.settings(), term.tensors())
        assert torch.equal(again.to_dense(), dense)
    again = [term_of(values, kind) for values in VALUE_KINDS for kind in MASK_KINDS]
    assert [save_bytes(term) for term in again] == [save_bytes(term) for term in terms]


def save_bytes(term):
    return {suffix: tensor.numpy().tobytes() for suffix, tensor in term.tensors().items()}


def test_bytes_of_format_1_0():
    matrix = torch.tensor([[0.0, 3.0, -0.5], [1.0, 0.0, 0.0]])
    term = Sparse.from_matrix(matrix, pack_bits(matrix != 0), "float16")
    assert term.settings() == {"values": "float16", "nnz": 3, "mask": "bits"}
    assert {suffix: raw.hex() for suffix, raw in save_bytes(term).items()} == {
        "delta_values": "003e" + "00b4" + "0038",
        "delta_gain": "00000040",
        "delta_bitmask": "06000000" + "01000000",
    }
    term = Sparse.from_matrix(matrix, SeedMask(5, "w", 0.5), "bfloat16", factor=2.0)
    words = philox(philox_key(5, "w"), 0, 2).reshape(-1)[:6]
    kept = [place for place, word in enumerate(words) if word < 2**31]
    recipe = {"mask": "seed", "seed": 5, "tensor": "w", "keep": 0.5}
    assert term.settings() == {"values": "bfloat16", "nnz": len(kept)} | recipe
    assert set(term.tensors()) == {"delta_values", "delta_gain"}
    assert term.to_dense().flatten()[kept].tolist() == (matrix * 2).flatten()[kept].tolist()


def damaged(term, suffix, position, value):
    tensors = {name: tensor.clone() for name, tensor in term.tensors().items()}
    tensors[suffix][position] = value
    return tensors


@pytest.mark.parametrize(
    ("term", "suffix", "position", "value", "message"),
    [
        (term_of("sign", "gaps"), "delta_packed", -1, -1, "padding"),
        (term_of("int-row", "bits"), "delta_packed", -1, -1, "padding"),
        (term_of("int-row", "bits"), "delta_gain", (0, 0), float("inf"), "NaN or infinity"),
        (term_of("sign", "seed-row"), "delta_keep", 2, float("nan"), "NaN or infinity"),
        (term_of("sign", "seed-row"), "delta_keep", 2, -1.0, "less than one entry"),
        (term_of("sign", "seed-row"), "delta_keep", 2, 0.2, "its mask has"),
        (term_of("float16", "gaps"), "delta_gaps", 0, 255, "its mask has"),
        (term_of("float16", "gaps"), "delta_gaps", 0, 254, "past the end"),
        (term_of("float16", "gaps"), "delta_row_bytes", 0, 0, "add up"),
        (term_of("float16", "two_four"), "delta_indices", (1, 0), 0, "ascend"),
        (term_of("float16", "two_four"), "delta_indices", (1, 1), -1, "padding"),
    ],
)
def test_damaged_payload_is_refused(term, suffix, position, value, message):
    with pytest.raises(LayoutError, match=message):
        Sparse.from_tensors(term.shape, term.settings(), damaged(term, suffix, position, value))


def test_a_zero_point_is_one_of_the_codes():
    term = term_of("int-zero-point", "bits")
    for zero_point in (-1, 8):
        with pytest.raises(LayoutError, match="'zero_point'"):
            Sparse.expect(term.shape, term.settings() | {"zero_point": zero_point})


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(MASK_KINDS), st.sampled_from(VALUE_KINDS), st.data())
def test_flipped_payload_bytes_are_refused_or_read(kind, values, data):
    term = term_of(values, kind)
    tensors = {name: tensor.clone() for name, tensor in term.tensors().items()}
    suffix = data.draw(st.sampled_from(sorted(name for name, tensor in tensors.items() if tensor.numel())))
    raw = tensors[suffix].view(torch.uint8).view(-1)
    raw[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    try:
        again = Sparse.from_tensors(term.shape, term.settings(), tensors)
    except LayoutError:
        return
    assert again.to_dense().shape == SHAPE
    assert int(unpack_bits(again.mask, SHAPE[1]).sum()) == term.nnz


@pytest.mark.parametrize("mask", ["gaps", "seed", "seed-row"])
def test_a_small_payload_of_a_huge_matrix_allocates_little(mask):
    shape = (4, 1 << 33)
    settings = {"values": "sign", "nnz": 0, "mask": mask.removesuffix("-row")}
    tensors = {"delta_packed": torch.zeros(0, dtype=torch.int32), "delta_gain": torch.ones(1)}
    if mask == "gaps":
        settings |= {"gap_bytes": 1, "nnz": 1}
        tensors["delta_packed"] = torch.ones(1, dtype=torch.int32)
        tensors |= {
            "delta_gaps": torch.tensor([7], dtype=torch.uint8),
            "delta_row_bytes": torch.eye(4).int()[0].clone(),
        }
    elif mask == "seed":
        settings |= {"seed": 0, "tensor": "w", "keep": 0.5}
    else:
        settings |= {"seed": 0, "tensor": "w", "keep": "row"}
        tensors["delta_keep"] = torch.zeros(4)
    tracemalloc.start()
    try:
        if mask == "seed":
            with pytest.raises(LayoutError, match="its mask has"):
                Sparse.from_tensors(shape, settings, tensors)
        else:
            assert "mask" not in vars(Sparse.from_tensors(shape, settings, tensors))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
