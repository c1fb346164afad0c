"""Headers of untrusted files: whatever the bytes are, the answer is a header or one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from deltakeeper.errors import CheckpointError
from deltakeeper.safetensors_header import parse_header, read_header

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def parse(value, data_bytes=24):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_header(raw, data_bytes, 100, "file")


def test_a_good_header_is_read(tmp_path):
    tensors = {"b": torch.zeros(3, dtype=torch.bfloat16), "a": torch.ones(2, 2), "empty": torch.zeros(0, 4)}
    (tmp_path / "x.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        entry = header.entries[name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert entry.end - entry.start == tensor.nbytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "F33"}, "not supported"),
        ({"dtype": 3}, "malformed"),
        ({"shape": [2, -3]}, "malformed"),
        ({"shape": [2, True]}, "malformed"),
        ({"shape": "2x3"}, "malformed"),
        ({"shape": [2, 4]}, "truncated or altered"),
        ({"shape": [10**15, 10**15]}, "malformed"),
        ({"shape": [0, 10**15, 10**15], "data_offsets": [24, 24]}, "malformed"),
        ({"shape": [1] * 9}, "malformed"),
        ({"data_offsets": [0, 10**30]}, "malformed"),
        ({"dtype": "F" * 10**6}, "malformed"),
        ({"data_offsets": [0]}, "malformed"),
        ({"data_offsets": [24, 0]}, "truncated or altered"),
        ({"data_offsets": [4, 28]}, "truncated or altered"),
    ],
)
def test_a_bad_entry_is_named(change, said):
    with pytest.raises(CheckpointError, match=said) as error:
        parse({"a": GOOD["a"] | change})
    assert "'a'" in str(error.value)


@pytest.mark.parametrize(
    ("value", "data_bytes", "said"),
    [
        (b'{"\\ud800": 1}', 0, "no printable text"),
        (b"[]", 0, "no JSON object"),
        (b"{", 0, "not JSON"),
        (b"\xff", 0, "not JSON"),
        (b'{"a": 1, "a": 1}', 0, "twice"),
        ({"__metadata__": {"x": 1}}, 0, "not text"),
        ({"a": 1}, 0, "malformed"),
        (GOOD, 30, "no tensor owns"),
        (GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, 24, "overlaps"),
        (GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [26, 30]}}, 30, "leaves a gap"),
    ],
)
def test_a_bad_header_is_refused(value, data_bytes, said):
    with pytest.raises(CheckpointError, match=said):
        parse(value, data_bytes)


@given(st.binary(max_size=200))
def test_random_bytes_never_escape_as_another_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(raw)
    try:
        read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)


@given(st.data())
def test_a_mutated_file_is_read_or_refused(tmp_path_factory, data):
    raw = bytearray(save({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.float16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        entries = read_header(path).entries
    except CheckpointError:
        return
    assert all(entry.end <= path.stat().st_size for entry in entries.values())


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")
