import pytest
import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts import Dense, GroupedInt, Lowrank, SeedMask, Signs, Sparse
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.testing import check_layout


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ints(rows, columns, bits=4, seed=0):
    return GroupedInt.from_matrix(numbers(rows, columns, seed=seed), bits, 16)


def half(rows, columns):
    return Dense((rows, columns), "delta", numbers(rows, columns).half())


def sparse(rows, columns, mask=None):
    matrix = numbers(rows, columns)
    return Sparse.from_matrix(matrix, mask or pack_bits(matrix > 0.5), "float16")


PAIRS = {
    "ints": (ints(3, 35), ints(3, 40, bits=2, seed=1)),
    "ints-dense": (ints(1, 35), half(1, 40)),
    "sparse": (sparse(4, 35), sparse(4, 40, SeedMask(7, "w", 0.3))),
    "dense-zeros": (half(2, 5), GroupedInt.from_matrix(numbers(2, 9), 5, 0, symmetric=False)),
}


@pytest.mark.parametrize("gain", [1.0, 1e-20])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_packed_factors_keep_the_contract_of_layouts(pair, gain):
    term = Lowrank.from_terms(*pair, gain)
    check_layout(term)
    left, right = (factor.to_dense().double() for factor in pair)
    torch.testing.assert_close(term.to_dense().double(), left.T @ right * gain, rtol=1e-4, atol=1e-5 * gain)
    assert term.rank == left.shape[0]
    assert torch.equal(term.left, pair[0].to_dense().T)
    assert torch.equal(term.right, pair[1].to_dense())


def test_payload_and_settings_are_those_of_the_factors_behind_a_prefix():
    left, right = PAIRS["ints"]
    term = Lowrank.from_terms(left, right)
    assert list(term.tensors()) == [
        "delta_U.delta_packed",
        "delta_U.delta_scale",
        "delta_U.delta_gain",
        "delta_V.delta_packed",
        "delta_V.delta_scale",
        "delta_V.delta_gain",
        "delta_gain",
    ]
    assert term.settings() == {
        "rank": 3,
        "factors": "packed",
        "left": {"layout": "grouped_int", "settings": left.settings()},
        "right": {"layout": "grouped_int", "settings": right.settings()},
    }


def test_float_factors_are_stored_as_before():
    term = Lowrank.from_factors(numbers(7, 3), numbers(3, 11), "float16")
    assert {k: tuple(v.shape) for k, v in term.tensors().items()} == {
        "delta_U": (7, 3),
        "delta_V": (3, 11),
        "delta_gain": (1,),
    }
    assert term.settings() == {"rank": 3, "factors": "float16"}
    assert term.packed is None


def signs(rows, columns):
    words = pack_bits(numbers(rows, columns) > 0)
    return Signs((rows, columns), "tensor", "plus", (words,), (torch.ones(1),))


@pytest.mark.parametrize(
    ("left", "right", "gain", "message"),
    [
        (ints(3, 5), ints(2, 5), 1.0, "no common rank"),
        (ints(3, 5), Dense((3, 7, 1), "delta", torch.zeros(3, 7, 1)), 1.0, "no common rank"),
        (ints(6, 5), ints(6, 5), 1.0, "'rank'"),
        (signs(3, 5), ints(3, 5), 1.0, "factors are terms of"),
        (ints(3, 5), Lowrank.from_terms(ints(2, 3), ints(2, 5)), 1.0, "factors are terms of"),
        (Dense((3, 5), "value", numbers(3, 5)), ints(3, 5), 1.0, "factors are terms of"),
        (ints(3, 5), ints(3, 5), float("inf"), "NaN or infinity"),
        (ints(3, 5), ints(3, 5), 1e-60, "underflows"),
    ],
)
def test_unfit_factors_are_refused(left, right, gain, message):
    with pytest.raises(LayoutError, match=message):
        Lowrank.from_terms(left, right, gain)


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        ({"layout": "lowrank", "settings": {"rank": 1, "factors": "float16"}}, "dense, grouped_int, sparse"),
        ({"layout": "signs", "settings": {"planes": 1, "scale": "tensor", "zero": "plus"}}, "dense, grouped_int"),
        ({"layout": "no such", "settings": {}}, "dense, grouped_int"),
        ({"layout": ["dense"], "settings": {}}, "dense, grouped_int"),
        ({"layout": "dense"}, "dense, grouped_int"),
        ({"layout": "dense", "settings": {"encoding": "value", "dtype": "float16"}}, "is a value"),
        ({"layout": "dense", "settings": {"encoding": ["value"], "dtype": "float16"}}, "'encoding'"),
        ({"layout": "grouped_int", "settings": {"bits": 4}}, "'group'"),
        ("grouped_int", "dense, grouped_int"),
        (None, "dense, grouped_int"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_damaged_settings_of_a_factor_are_refused(side, nested, message):
    term = Lowrank.from_terms(*PAIRS["ints"])
    with pytest.raises(LayoutError, match=message):
        Lowrank.expect(term.shape, {**term.settings(), side: nested})


def test_damage_inside_a_factor_is_found():
    term = Lowrank.from_terms(*PAIRS["ints"])
    tensors = {suffix: tensor.clone() for suffix, tensor in term.tensors().items()}
    tensors["delta_U.delta_packed"][0, -1] = 1 << 30
    with pytest.raises(LayoutError, match="padding"):
        Lowrank.from_tensors(term.shape, term.settings(), tensors)


def test_scales_of_packed_factors_can_be_trained():
    term = Lowrank.from_terms(*PAIRS["ints"], 0.5)
    values = {suffix: tensor.requires_grad_() for suffix, tensor in term.continuous().items()}
    assert set(values) == {"delta_U.delta_scale", "delta_V.delta_scale"}
    dense = term.dense_from(values)
    torch.testing.assert_close(dense.detach(), term.to_dense())
    dense.square().sum().backward()
    assert all(bool(value.grad.any()) for value in values.values())
    trained = {suffix: value.detach() * 2 for suffix, value in values.items()}
    torch.testing.assert_close(term.replace_continuous(trained).to_dense(), term.to_dense() * 4)
