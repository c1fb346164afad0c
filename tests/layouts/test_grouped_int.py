import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.errors import LayoutError
from deltakeeper.layouts import GroupedInt
from deltakeeper.layouts.codes import pack_codes
from deltakeeper.layouts.grouped_int import stored_scale


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(low, high, *shape, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [0, 1, 5, 16, 400])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_times_scales(bits, group):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = whole(0, 1, 4, 37) * 2 - 1 if bits == 1 else whole(low, high, 4, 37)
    scale = stored_scale(numbers(4, -(-37 // group) if group else 1).abs() * 1e-7, "float16")
    decoded = GroupedInt.from_codes(codes.to(torch.int8), scale, bits=bits, group=group).to_dense()
    for i in range(4):
        for j in range(37):
            assert decoded[i, j] == codes[i, j].float() * scale[i, j // group if group else 0]


def test_zero_points_are_subtracted():
    codes, zeros = whole(0, 255, 3, 20), whole(0, 255, 3, 4, seed=1)
    scale = numbers(3, 4)
    term = GroupedInt.from_codes(
        codes.to(torch.uint8), scale, bits=8, group=6, zero_point=zeros.to(torch.uint8), scale_dtype="float32"
    )
    wanted = (codes - zeros.repeat_interleave(6, 1)[:, :20]).float() * scale.repeat_interleave(6, 1)[:, :20]
    assert torch.equal(term.to_dense(), wanted)


@pytest.mark.parametrize(
    ("codes", "bits", "zero_point", "message"),
    [
        ([[4, 0]], 3, None, "does not fit 3 bits"),
        ([[-5, 0]], 3, None, "does not fit 3 bits"),
        ([[1, 0]], 1, None, "does not fit 1 bits"),
        ([[8, 0]], 3, [[0]], "does not fit 3 bits"),
        ([[-1, 0]], 3, [[0]], "does not fit 3 bits"),
        ([[1, 0]], 3, [[8]], "zero point .* does not fit 3 bits"),
    ],
)
def test_codes_out_of_range_are_refused(codes, bits, zero_point, message):
    zeros = None if zero_point is None else torch.tensor(zero_point)
    with pytest.raises(LayoutError, match=message):
        GroupedInt.from_codes(
            torch.tensor(codes, dtype=torch.int8), torch.ones(1, 1), bits=bits, group=0, zero_point=zeros
        )


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 3e38])
def test_scales_that_leave_float32_are_refused(scale):
    with pytest.raises(LayoutError, match=r"leave float32|NaN or infinity"):
        GroupedInt.from_codes(torch.ones(1, 2, dtype=torch.int8), torch.full((1, 1), scale), bits=4, group=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_matrix_near_the_end_of_float32_is_refused_or_finite(symmetric):
    for peak in (1e38, 3.4e38):
        matrix = torch.tensor([[peak, -peak, 0.0]])
        try:
            assert GroupedInt.from_matrix(matrix, 2, 0, symmetric=symmetric).to_dense().isfinite().all()
        except LayoutError:
            assert peak > 1e38 or not symmetric


TERM = GroupedInt.from_matrix(numbers(3, 35), 3, 8)
ZEROS = GroupedInt.from_matrix(numbers(3, 35), 3, 8, symmetric=False)


@pytest.mark.parametrize(
    ("term", "suffix", "position", "value", "message"),
    [
        (TERM, "delta_packed", (1, 3), 1 << 9, "padding"),
        (TERM, "delta_scale", (0, 2), float("inf"), "NaN or infinity"),
        (TERM, "delta_gain", (0,), 0.0, "leave float32"),
        (TERM, "delta_gain", (0,), -1.0, "leave float32"),
        (TERM, "delta_gain", (0,), 3e38, "leave float32"),
        (ZEROS, "delta_zero_point", (2, 4), 8, "zero point"),
    ],
)
def test_damaged_payload_is_refused(term, suffix, position, value, message):
    tensors = {name: tensor.clone() for name, tensor in term.tensors().items()}
    tensors[suffix][position] = value
    with pytest.raises(LayoutError, match=message):
        GroupedInt.from_tensors(term.shape, term.settings(), tensors)


@pytest.mark.parametrize(("key", "value"), [("bits", 0), ("bits", 9), ("group", -1), ("scale", "bfloat16")])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(LayoutError, match=f"'{key}'"):
        GroupedInt.expect((3, 35), {**TERM.settings(), key: value})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e30])
def test_no_magnitude_is_lost_to_half_precision_scales(size, bits, symmetric):
    errors = []
    for scale in (size, 1.0):
        matrix = (numbers(6, 64).double() * scale).float()
        decoded = GroupedInt.from_matrix(matrix, bits, 16, symmetric=symmetric).to_dense()
        errors.append(float((decoded.double() - matrix).norm() / matrix.double().norm()))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@given(st.integers(1, 5), st.integers(1, 70), st.integers(2, 8), st.integers(0, 9), st.booleans(), st.integers(0, 9))
def test_rounding_is_within_half_a_step_of_entries_on_the_grid(out, columns, bits, group, symmetric, seed):
    matrix = numbers(out, columns, seed=seed) * (numbers(out, columns, seed=seed + 1) > -0.5)
    term = GroupedInt.from_matrix(matrix, bits, group, symmetric=symmetric, scale_dtype="float32")
    step = term.steps.repeat_interleave(group or columns, 1)[:, :columns]
    error = (term.to_dense() - matrix).abs()
    assert bool((error <= step * (0.5 if symmetric else 1.0) * 1.0001).all())
    assert not term.to_dense()[matrix == 0].any()


def test_one_bit_is_the_sign_times_the_mean():
    matrix = numbers(4, 24)
    mean = matrix.abs().reshape(4, 3, 8).mean(2).repeat_interleave(8, 1)
    decoded = GroupedInt.from_matrix(matrix, 1, 8, scale_dtype="float32").to_dense()
    torch.testing.assert_close(decoded, mean * matrix.sign())


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_merged_as_the_dense_form_is(symmetric):
    term = GroupedInt.from_matrix(numbers(9, 35), 4, 8, symmetric=symmetric)
    base = numbers(3, 35, seed=1).bfloat16()
    into = torch.empty(3, 35, dtype=torch.bfloat16)
    assert term.merge_rows(base, slice(2, 5), into)
    assert torch.equal(into, torch.add(term.to_dense()[2:5], base).bfloat16())
    assert term.merge_rows(None, slice(2, 5), into)
    assert torch.equal(into, term.to_dense()[2:5].bfloat16())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 8])
def test_steps_can_be_trained(group, symmetric):
    term = GroupedInt.from_matrix(numbers(5, 35) * 1e-6, 4, group, symmetric=symmetric)
    values = {suffix: tensor.requires_grad_() for suffix, tensor in term.continuous().items()}
    dense = term.dense_from(values)
    assert torch.equal(dense.detach(), term.to_dense())
    weights = numbers(5, 35, seed=1)
    (dense * weights).sum().backward()
    step = values["delta_scale"]
    where = torch.arange(35) // (group or 35)
    codes = term.to_dense() / step.detach()[:, where]
    wanted = torch.zeros_like(step).index_add_(1, where, codes.nan_to_num() * weights)
    torch.testing.assert_close(step.grad, wanted, rtol=1e-4, atol=1e-3)


def test_trained_steps_are_packed_back():
    term = GroupedInt.from_matrix(numbers(5, 35), 4, 8)
    same = term.replace_continuous(term.continuous())
    assert {k: v.tolist() for k, v in same.tensors().items()} == {k: v.tolist() for k, v in term.tensors().items()}
    larger = term.replace_continuous({"delta_scale": term.steps * 3e6})
    torch.testing.assert_close(larger.to_dense(), term.to_dense() * 3e6, rtol=1e-3, atol=0.0)
    assert torch.equal(larger.packed, term.packed)
    with pytest.raises(LayoutError, match="NaN or infinity"):
        term.replace_continuous({"delta_scale": term.steps / 0.0})


def test_bytes_are_known_beforehand():
    term = GroupedInt.from_matrix(numbers(5, 35), 3, 8, symmetric=False, scale_dtype="float32")
    found = GroupedInt.payload_bytes((5, 35), 3, 8, symmetric=False, scale_dtype="float32")
    assert found == term.nbytes == 5 * 4 * 4 + 5 * 5 * 4 + 4 + 5 * 5


def test_the_stored_order_of_codes_is_that_of_the_format():
    codes = torch.tensor([[(i % 8) - 4 for i in range(35)]], dtype=torch.int8)
    term = GroupedInt.from_codes(codes, torch.ones(1, 1), bits=3, group=0)
    assert [word & 0xFFFFFFFF for word in term.packed[0].tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA, 0x88]
    assert torch.equal(term.packed, pack_codes((codes + 4).to(torch.uint8), 3))
