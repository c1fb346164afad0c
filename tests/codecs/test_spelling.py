import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.codecs import CODECS, BitDelta, Dare, DenseCodec, Magnitude, Shrink, SumCodec, Svd, parse_codec, spell
from deltakeeper.codecs.table import codec_table
from deltakeeper.errors import CodecError

seeds = st.integers(0, 2**64 - 1)
shares = st.floats(0, 1, exclude_min=True)
values = st.sampled_from(["float16", "bfloat16", "float32"])
single = st.one_of(
    st.just(DenseCodec()),
    st.builds(
        BitDelta,
        bits=st.integers(1, 8),
        scale=st.sampled_from(["tensor", "row", "column"]),
        zero=st.sampled_from(["auto", "plus", "minus", "zero"]),
    ),
    st.builds(Svd, rank=st.integers(1, 1 << 20), niter=st.integers(0, 64), factors=values, seed=seeds),
    st.builds(Svd, energy=shares),
    st.builds(Magnitude, keep=shares, per=st.sampled_from(["tensor", "row"]), rescale=st.booleans(), values=values),
    st.builds(Dare, p=st.floats(0, 0.9999), q=st.none() | shares, values=values, seed=seeds),
    st.builds(Shrink, factor=st.floats(0, 16) | st.integers(0, 16)),
)
codecs = single | st.lists(single, min_size=2, max_size=4).map(lambda parts: SumCodec(tuple(parts)))


@given(codecs)
def test_spelling_round_trips(codec):
    assert parse_codec(spell(codec)) == codec
    assert spell(parse_codec(spell(codec))) == spell(codec)


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("bitdelta", BitDelta()),
        ("bitdelta:bits=2,scale=row", BitDelta(bits=2, scale="row")),
        (" bitdelta : bits = 2", None),
        ("bitdelta:bits= 2 , zero=minus", BitDelta(bits=2, zero="minus")),
        ("svd:energy=.9", Svd(energy=0.9)),
        ("svd:rank=8,energy=none", Svd(rank=8)),
        ("shrink:factor=1e+1 + dense", SumCodec((Shrink(factor=10), DenseCodec()))),
        ("magnitude:rescale=true", Magnitude(rescale=True)),
    ],
)
def test_spellings(text, codec):
    if codec is None:
        with pytest.raises(CodecError, match="did you mean 'bitdelta'"):
            parse_codec(text)
    else:
        assert parse_codec(text) == codec


def test_defaults_are_left_out_and_whole_floats_are_short():
    assert spell(BitDelta(bits=2)) == "bitdelta:bits=2"
    assert spell(Shrink(factor=1)) == "shrink:factor=1"
    assert spell(SumCodec((BitDelta(), Svd(rank=8)))) == "bitdelta+svd:rank=8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitdelt:bits=1", "unknown codec 'bitdelt'.*did you mean 'bitdelta'"),
        ("bitdelta+", r"part of the sum 'bitdelta\+' is empty"),
        ("gguf", "unknown codec 'gguf'.*choose one of bitdelta, .*dare, "),
        ("", "unknown codec ''"),
        ("bitdelta++dense", "unknown codec"),
        ("bitdelta:bit=1", "no setting 'bit'; did you mean 'bits'"),
        ("bitdelta:frobnicate=1", "choose one of bits, scale, zero"),
        ("dense:bits=1", "no setting 'bits'; it takes none"),
        ("bitdelta:", "write it as setting=value"),
        ("bitdelta:bits", "write it as setting=value"),
        ("bitdelta:bits=1,", "write it as setting=value"),
        ("bitdelta:bits=1,bits=2", "stands twice"),
        ("bitdelta:bits=two", "'two' but must be a whole number"),
        ("bitdelta:bits=2.0", "must be a whole number"),
        ("bitdelta:bits=true", "must be a whole number"),
        ("bitdelta:bits=none", "must be a whole number"),
        ("bitdelta:bits=9", "at most 8"),
        ("bitdelta:bits=0", "at least 1"),
        ("bitdelta:scale=rows", "one of tensor, row, column"),
        ("magnitude:rescale=True", "true or false"),
        ("magnitude:rescale=1", "true or false"),
        ("magnitude:keep=nan", "must be a number"),
        ("magnitude:keep=1e999", "must be a number"),
        ("shrink:factor=inf", "must be a number"),
        ("svd", "exactly one of 'rank' and 'energy'"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(CodecError, match=message) as caught:
        parse_codec(text)
    assert "\n" not in str(caught.value)


def test_the_table_has_a_row_for_each_codec_with_its_settings():
    head, *rows = (line for line in codec_table().splitlines() if line.startswith(("| codec", "| `")))
    assert [row.split("`")[1] for row in rows] == sorted(CODECS)
    assert all(row.count(" | ") == head.count(" | ") for row in rows)
    bitdelta = next(row for row in rows if row.startswith("| `bitdelta`"))
    assert "`bits=1`" in bitdelta
    assert "[2402.10193](https://arxiv.org/abs/2402.10193)" in bitdelta
    assert sum("(control)" in row for row in rows) == sum(codec.control for codec in CODECS.values())
