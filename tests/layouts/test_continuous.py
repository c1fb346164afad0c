"""The suite finds what is wrong with values that may be trained."""

import pytest
import torch

from deltakeeper.layouts import Lowrank, Signs
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.testing import check_layout

RIGHT = Signs.dense_from, Signs.replace_continuous, Lowrank.dense_from


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIGNS = Signs((5, 35), "row", "plus", (pack_bits(numbers(5, 35) > 0),), (numbers(5, 1, seed=1).abs(),))
FACTORS = Lowrank.from_factors(numbers(7, 3), numbers(3, 11), "bfloat16")


def scaled(values, factor):
    return {suffix: value * factor for suffix, value in values.items()}


@pytest.mark.parametrize(
    ("method", "fault", "message"),
    [
        ("dense_from", lambda self, values: RIGHT[0](self, scaled(values, 1 + 1e-6)), "something else than it stores"),
        ("dense_from", lambda self, values: RIGHT[0](self, values).detach().requires_grad_(), "gives no gradient"),
        (
            "dense_from",
            lambda self, values: RIGHT[0](self, {k: 2 * v - v.detach() for k, v in values.items()}),
            "gives wrong gradients",
        ),
        ("replace_continuous", lambda self, values: RIGHT[1](self, scaled(values, 2)), "values are put back"),
    ],
)
def test_faults_of_signs_are_found(monkeypatch, method, fault, message):
    check_layout(SIGNS)
    monkeypatch.setattr(Signs, method, fault)
    with pytest.raises(AssertionError, match=message):
        check_layout(SIGNS)


def test_a_factor_that_takes_no_gradient_is_found(monkeypatch):
    check_layout(FACTORS)

    def one_sided(self, values):
        right = values["delta_V"]
        return RIGHT[2](self, values | {"delta_V": right.detach() + 0 * right})

    monkeypatch.setattr(Lowrank, "dense_from", one_sided)
    with pytest.raises(AssertionError, match="gives wrong gradients"):
        check_layout(FACTORS)
