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
def test_random_signs_are_as_large_as_a_bitdelta_plane(scale):
    delta = gaussian(400, 500)
    random = decode(RandomSign(scale=scale), delta)
    plane = decode(BitDelta(scale=scale, zero="plus"), delta)
    assert torch.equal(random.abs(), plane.abs())
    cosine = float((random * delta).sum() / random.norm() / delta.norm())
    assert abs(cosine) < 5 / delta.numel() ** 0.5
    assert abs(float((random > 0).float().mean()) - 0.5) < 2.5 / delta.numel() ** 0.5


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
