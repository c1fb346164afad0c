import pytest
import torch

from deltakeeper.codecs import CODECS, BitDelta, DenseCodec, RandomSign, Shrink
from deltakeeper.errors import CodecError


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode(codec, delta, name="w"):
    (term,) = codec.encode(delta, name=name)
    return term.to_dense()


def test_controls_say_so():
    assert {name for name, codec in CODECS.items() if codec.control} == {"shrink", "random_sign"}


@pytest.mark.parametrize("factor", [0, 0.3, 1, 2.5])
def test_shrink_multiplies(factor):
    delta = gaussian(20, 30)
    assert torch.equal(decode(Shrink(factor=factor), delta), delta * factor)


def test_growing_past_float32_is_refused():
    with pytest.raises(CodecError, match="overflows float32"):
        Shrink(factor=2).encode(torch.full((2, 2), 3e38), name="w")


@pytest.mark.parametrize("scale", ["tensor", "row", "column"])
@pytest.mark.parametrize("zeros", [0, 350])
def test_random_signs_are_as_large_as_a_bitdelta_plane(scale, zeros):
    delta = gaussian(400, 500)
    delta[:, :zeros] = 0.0
    random = decode(RandomSign(scale=scale), delta)
    plane = decode(BitDelta(scale=scale), delta)
    assert torch.equal(random.abs(), plane.abs())
    if zeros:
        assert not random[:, :zeros].any()
        return
    cosine = float((random * delta).sum() / random.norm() / delta.norm())
    assert abs(cosine) < 5 / delta.numel() ** 0.5
    assert abs(float((random > 0).float().mean()) - 0.5) < 2.5 / delta.numel() ** 0.5


@pytest.mark.parametrize("settings", [{}, {"scale": "row", "zero": "plus"}, {"scale": "column"}])
@pytest.mark.parametrize("norm", [0.01, 1.0, 3.5])
def test_random_signs_of_any_length(settings, norm):
    delta = gaussian(60, 70) * 1e-6
    delta[:, :50] = 0.0
    found = decode(RandomSign(norm=norm, **settings), delta)
    assert float(found.double().norm() / delta.double().norm()) == pytest.approx(norm, rel=1e-5)
    assert not decode(RandomSign(norm=norm), torch.zeros(5, 6)).any()


def test_a_length_that_leaves_float32_is_refused():
    with pytest.raises(CodecError, match="smaller 'norm'"):
        RandomSign(norm=16).encode(torch.full((2, 2), 3e38), name="w")


def test_random_signs_depend_on_seed_and_name():
    delta = gaussian(64, 64)
    one = decode(RandomSign(), delta)
    assert torch.equal(one, decode(RandomSign(), -2 * delta) / 2)
    assert not torch.equal(one, decode(RandomSign(seed=1), delta))
    assert not torch.equal(one, decode(RandomSign(), delta, name="v"))


def test_dense_stores_the_value_bit_for_bit_or_the_exact_delta():
    base, tuned = gaussian(5, 7).bfloat16(), gaussian(5, 7, seed=1).bfloat16()
    delta = tuned.float() - base.float()
    (value,) = DenseCodec().encode(delta, name="w", tuned=tuned)
    assert value.replaces
    assert torch.equal(value.to_dense(), tuned)
    assert torch.equal(decode(DenseCodec(), delta), delta)


def test_dense_does_not_share_memory_with_its_input():
    delta = gaussian(3, 4)
    (term,) = DenseCodec().encode(delta, name="w")
    kept = delta.clone()
    delta.zero_()
    assert torch.equal(term.to_dense(), kept)
