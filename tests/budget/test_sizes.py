"""Sizes and ratios as people write them."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.budget import parse_ratio, parse_size
from deltakeeper.errors import CodecError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("400MB", 400_000_000),
        ("400 MB", 400_000_000),
        (" 1.5GiB ", 1_610_612_736),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("2.5 MiB", 2_621_440),
        ("3gb", 3_000_000_000),
        ("12B", 12),
        ("0.0015kB", 1),
        ("1.1TB", 1_100_000_000_000),
    ],
)
def test_a_size_is_read_in_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "-1MB", "1e6", "4 00MB", "0", "0.5B", "NaN", "inf", "4MBB", "4 bits", "٤MB"]
)
def test_what_is_no_size_is_refused_in_a_sentence(text):
    with pytest.raises(CodecError, match=r"^'.*' (is|has) .*[.]$"):
        parse_size(text)


@given(st.integers(1, 10**15), st.sampled_from([("kB", 10**3), ("MB", 10**6), ("MiB", 2**20), ("GiB", 2**30), ("", 1)]))
def test_whole_numbers_of_a_unit_are_exact(number, unit):
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]


@given(st.decimals(min_value=1, max_value=10**6, places=3), st.sampled_from(["kB", "MB", "GB"]))
def test_decimal_fractions_are_exact(number, unit):
    assert parse_size(f"{number}{unit}") == int(number * {"kB": 1000, "MB": 10**6, "GB": 10**9}[unit])


@given(st.text(string.printable, max_size=12))
def test_any_text_is_a_size_or_refused(text):
    try:
        assert parse_size(text) >= 1
    except CodecError as error:
        assert str(error).endswith(".")


@pytest.mark.parametrize(("text", "size"), [("16", 1000), ("16x", 1000), ("2.5", 6400), ("1", 16000), ("16 ×", 1000)])
def test_a_ratio_is_of_the_fine_tune(text, size):
    assert parse_ratio(text, 16000) == size


@pytest.mark.parametrize("text", ["", "0.5", "0", "-2", "x16", "16:1"])
def test_what_is_no_ratio_is_refused(text):
    with pytest.raises(CodecError, match="ratio"):
        parse_ratio(text, 16000)
