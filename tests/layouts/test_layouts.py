import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.errors import LayoutError
from deltakeeper.layouts import LAYOUTS, Dense, GroupedInt, Lowrank, SeedMask, Signs, Sparse
from deltakeeper.layouts.bits import count_bits, pack_bits
from deltakeeper.layouts.signs import scale_shape
from deltakeeper.testing import check_layout


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs_term(out=5, columns=35, planes=2, scale="row", zero="plus"):
    bits = [numbers(out, columns, seed=k) > 0 for k in range(planes)]
    present = numbers(out, columns, seed=99) > -0.5 if zero == "zero" else None
    if present is not None:
        bits = [plane & present for plane in bits]
    scales = tuple(numbers(*scale_shape((out, columns), scale), seed=k + 50).abs() for k in range(planes))
    packed = tuple(pack_bits(plane) for plane in bits)
    term = Signs((out, columns), scale, zero, packed, scales, None if present is None else pack_bits(present))
    return term, bits, present


def sparse_term(columns=35, values="float16", recipe=None):
    matrix = numbers(6, columns)
    return Sparse.from_matrix(matrix, recipe or pack_bits(matrix > 1), values)


TERMS = {
    **{
        f"signs-{scale}-{zero}": signs_term(scale=scale, zero=zero)[0]
        for scale in ("tensor", "row", "column")
        for zero in ("plus", "minus", "zero")
    },
    **{
        f"lowrank-{dtype}": Lowrank.from_factors(numbers(7, 3), numbers(3, 11), dtype)
        for dtype in ("float16", "bfloat16", "float32")
    },
    **{
        f"grouped-int-{bits}-{group}-{'symmetric' if symmetric else 'zeros'}": GroupedInt.from_matrix(
            numbers(5, 35), bits, group, symmetric=symmetric, scale_dtype=scale
        )
        for bits, group, symmetric, scale in (
            (1, 8, True, "float16"),
            (3, 0, True, "float32"),
            (4, 32, False, "float16"),
            (8, 7, False, "float32"),
        )
    },
    "sparse-bits": sparse_term(),
    "sparse-bfloat16": sparse_term(values="bfloat16"),
    "sparse-float32": sparse_term(values="float32", columns=64),
    "sparse-seed": sparse_term(recipe=SeedMask(2**64 - 1, "model.layers.0.w", 0.3)),
    "sparse-empty": Sparse.from_matrix(torch.zeros(2, 3), pack_bits(torch.zeros(2, 3) > 0), "float16"),
    "dense-delta": Dense((2, 3, 4), "delta", numbers(2, 3, 4)),
    "dense-delta-half": Dense((5,), "delta", numbers(5).half()),
    "dense-value": Dense((4, 3), "value", numbers(4, 3).bfloat16()),
    "dense-scalar": Dense((), "value", torch.tensor(3)),
    "dense-float8": Dense((4,), "value", numbers(4).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())
def test_layout_keeps_the_contract(term):
    check_layout(term)


def test_every_registered_layout_is_checked_above():
    assert {term.name for term in TERMS.values()} == set(LAYOUTS)


@pytest.mark.parametrize("zero", ["plus", "zero"])
@pytest.mark.parametrize("scale", ["tensor", "row", "column"])
def test_signs_are_scales_times_plus_or_minus_one(scale, zero):
    term, bits, present = signs_term(scale=scale, zero=zero)
    wanted = sum((plane.float() * 2 - 1) * s for plane, s in zip(bits, term.scales, strict=True))
    assert torch.equal(term.to_dense(), wanted if present is None else wanted * present)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 4), st.data())
def test_fewer_planes_are_the_first_planes(out, columns, planes, data):
    term, bits, _ = signs_term(out, columns, planes)
    fewer = data.draw(st.integers(1, planes))
    coarse = term.with_planes(fewer)
    assert coarse.settings()["planes"] == fewer
    wanted = sum((plane.float() * 2 - 1) * s for plane, s in zip(bits[:fewer], term.scales, strict=False))
    assert torch.equal(coarse.to_dense(), wanted)


@pytest.mark.parametrize("planes", [0, 3])
def test_planes_that_are_not_stored_are_refused(planes):
    with pytest.raises(LayoutError, match="1 to 2 are stored"):
        signs_term()[0].with_planes(planes)


def damaged(term, suffix, position, value):
    tensors = {name: tensor.clone() for name, tensor in term.tensors().items()}
    tensors[suffix][position] = value
    return tensors


@pytest.mark.parametrize(
    ("term", "suffix", "position", "value", "message"),
    [
        (signs_term()[0], "delta_packed.1", (0, 1), -(2**31), "padding"),
        (signs_term(zero="zero")[0], "delta_nonzero", (2, 1), 1 << 3, "padding"),
        (signs_term(zero="zero")[0], "delta_packed.0", (0, 0), -1, "gives zeros a sign"),
        (signs_term()[0], "delta_scale.1", (0, 0), float("inf"), "NaN or infinity"),
        (sparse_term(), "delta_bitmask", (0, 1), 1 << 3, "padding"),
        (sparse_term(), "delta_bitmask", (0, 0), -1, "its mask has"),
        (TERMS["lowrank-float16"], "delta_V", (0, 0), float("nan"), "NaN or infinity"),
        (TERMS["dense-value"], "delta", (0, 0), float("nan"), "NaN or infinity"),
        (TERMS["dense-float8"], "delta", (0,), float("nan"), "NaN or infinity"),
    ],
)
def test_damaged_payload_is_refused(term, suffix, position, value, message):
    with pytest.raises(LayoutError, match=message):
        type(term).from_tensors(term.shape, term.settings(), damaged(term, suffix, position, value))


def test_another_recipe_contradicts_the_stated_count():
    term = TERMS["sparse-seed"]
    with pytest.raises(LayoutError, match="its mask has"):
        Sparse.from_tensors(term.shape, {**term.settings(), "keep": 0.9}, term.tensors())


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (4, 0), ()])
@pytest.mark.parametrize("key", ["signs-row-plus", "lowrank-float16", "sparse-bits"])
def test_packed_layouts_take_matrices_only(key, shape):
    with pytest.raises(LayoutError, match="non-empty matrices"):
        TERMS[key].expect(shape, TERMS[key].settings())


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(LayoutError, match="'rank'"):
        Lowrank.expect((7, 11), {"rank": 8, "factors": "float16"})


def test_a_delta_cannot_be_whole_numbers():
    with pytest.raises(LayoutError, match="'dtype'"):
        Dense.expect((3,), {"encoding": "delta", "dtype": "int64"})


@given(st.integers(-1000, 1000).map(lambda n: n * 1e-10), st.sampled_from(["float16", "bfloat16"]))
def test_half_precision_values_survive_tiny_deltas(number, dtype):
    matrix = torch.full((1, 3), number)
    decoded = Sparse.from_matrix(matrix, pack_bits(matrix == matrix), dtype).to_dense()
    torch.testing.assert_close(decoded, matrix, rtol=2**-8, atol=0.0)


@given(st.integers(-1023, 1023), st.integers(-40, 40))
def test_the_gain_is_exact(mantissa, exponent):
    matrix = torch.tensor([[float(mantissa), 1.0, -3.0]]) * 2.0**exponent
    term = Sparse.from_matrix(matrix, pack_bits(matrix == matrix), "float16")
    assert torch.equal(term.to_dense(), matrix)


def test_seeded_mask_costs_no_bytes():
    term = TERMS["sparse-seed"]
    assert term.nbytes == 2 * term.nnz + 4
    assert term.nnz == count_bits(term.mask)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_factors_that_leave_float32_are_refused(size):
    with pytest.raises(LayoutError, match=r"leave this tensor dense|NaN or infinity"):
        Lowrank.from_factors(torch.full((2, 1), size), torch.full((1, 2), size), "float16")


def test_a_value_replaces_and_keeps_its_dtype():
    value, delta = TERMS["dense-value"], TERMS["dense-delta-half"]
    assert value.replaces
    assert value.to_dense().dtype == torch.bfloat16
    assert not delta.replaces
    assert delta.to_dense().dtype == torch.float32
