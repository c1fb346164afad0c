"""Traces on disk: the same numbers and bytes back, and files of strangers refused before anything is made of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lens_traces import make_traces

from deltakeeper.errors import DataError
from deltakeeper.lens.trace_file import read_trace, write_trace
from deltakeeper.lens.trace_json import from_json, round_numbers, to_json


@pytest.fixture(scope="module")
def value():
    return to_json(make_traces()["half"])


def test_a_file_gives_the_trace_back_and_the_same_bytes(tmp_path):
    trace = make_traces()["half"]
    write_trace(trace, tmp_path / "deep" / "a.json")
    again = read_trace(tmp_path / "deep" / "a.json")
    write_trace(again, tmp_path / "deep" / "b.json")
    assert (tmp_path / "deep" / "a.json").read_bytes() == (tmp_path / "deep" / "b.json").read_bytes()
    assert again.meta == trace.meta and again.tokens == trace.tokens and again.words == trace.words
    np.testing.assert_array_equal(again.entropy, trace.entropy)
    np.testing.assert_array_equal(again.targets["refusal"].log_prob, trace.targets["refusal"].log_prob)
    for one, other in zip(again.trajectories, trace.trajectories, strict=True):
        assert one.keys() == other.keys() and all((one[i] == other[i]).all() for i in one)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"a.json", "b.json"}  # nothing temporary is left


def test_a_trace_is_read_only(value):
    trace = from_json(value, "here")
    with pytest.raises(ValueError, match="read-only"):
        trace.entropy[0, 0] = 1
    with pytest.raises(TypeError):
        trace.kl["x"] = trace.entropy


def test_missing_numbers_are_null(tmp_path):
    trace = make_traces()["half"]
    holed = np.where(np.eye(*trace.cells, dtype=bool), np.nan, trace.kl["base"]).astype(np.float32)
    write_trace(dataclasses.replace(trace, kl={"base": holed}), tmp_path / "a.json")
    assert "null" in (tmp_path / "a.json").read_text()
    np.testing.assert_array_equal(read_trace(tmp_path / "a.json").kl["base"], holed)


@given(st.lists(st.floats(width=32), min_size=1))
def test_rounding_keeps_five_digits_and_rounds_once(values):
    given_values = np.array(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        once = round_numbers(given_values)
        assert np.array_equal(round_numbers(once), once, equal_nan=True)
    finite = np.isfinite(given_values) & (np.abs(given_values) > 1e-30)
    np.testing.assert_allclose(once[finite], given_values[finite], rtol=6e-5)


def set_at(path, item):
    def change(value):
        *way, last = path
        for step in way:
            value = value[step]
        value[last] = item(value[last]) if callable(item) else item

    return change


HOSTILE = {
    "another format": set_at(["format"], "other"),
    "another version": set_at(["version"], 2),
    "a version that is true": set_at(["version"], True),
    "an unknown field": lambda value: value.update(extra=1),
    "a lacking field": lambda value: value.pop("kl"),
    "no layers": set_at(["layers"], []),
    "falling layers": set_at(["layers"], [3, 2, 1, 0]),
    "half a layer": set_at(["layers", 0], 0.5),
    "a position outside the text": set_at(["positions", 1], 99),
    "a huge token id": set_at(["top_ids", 0, 0, 0], 2**31),
    "a negative token id": set_at(["top_ids", 0, 0, 0], -1),
    "a flag for a number": set_at(["entropy", 0, 0], True),
    "a text for a number": set_at(["entropy", 0, 0], "1"),
    "an endless number": set_at(["entropy", 0, 0], math.inf),
    "a number beyond float32": set_at(["entropy", 0, 0], 1e39),
    "a whole number beyond all floats": set_at(["entropy", 0, 0], 10**400),
    "negative entropy": set_at(["entropy", 0, 0], -0.1),
    "a row too few": set_at(["entropy"], lambda rows: rows[1:]),
    "a ragged row": set_at(["kl_final", 1], lambda row: row[1:]),
    "a list too deep": set_at(["kl_final", 1, 0], [1]),
    "ragged top tokens": set_at(["top_ids", 2, 1], lambda row: row[1:]),
    "no top tokens": set_at(["top_ids"], [[[]]]),
    "top tokens that are none": set_at(["top_ids"], {"0": 1}),
    "rising top probabilities": set_at(["top_probs", 0, 0], lambda row: row[::-1]),
    "a probability above one": set_at(["top_probs", 0, 0, 0], 1.5),
    "a probability that is null": set_at(["top_probs", 0, 0, 0], None),
    "a positive log-probability": set_at(["targets", "refusal", "log_prob", 0, 0], 0.5),
    "a rank that is null": set_at(["targets", "refusal", "rank", 0, 0], None),
    "a target with more": lambda value: value["targets"]["refusal"].update(more=1),
    "a target without tokens": set_at(["targets", "refusal", "ids"], []),
    "produced tokens for other positions": set_at(["targets", "produced", "ids"], [1]),
    "an unknown part of the shift": lambda value: value["shift"].update(odd=value["entropy"]),
    "too many references": set_at(["kl"], lambda kl: {str(i): kl["base"] for i in range(300)}),
    "trajectories of one position": set_at(["trajectories"], lambda curves: curves[1:]),
    "a trajectory less": lambda value: value["trajectories"][0].pop(str(value["top_ids"][0][0][0])),
    "a short trajectory": lambda value: next(iter(value["trajectories"][0].values())).pop(),
    "a trajectory above one": lambda value: next(iter(value["trajectories"][0].values())).__setitem__(0, 2),
    "a token id with zeros before it": lambda value: value["words"].update({"007": "x"}),
    "a token id of other digits": lambda value: value["words"].update({"٣": "x"}),
    "a word that is a number": lambda value: value["words"].update({"7": 7}),
    "a word without end": lambda value: value["words"].update({"7": "x" * 3000}),
    "half a character": set_at(["tokens", 0], "\ud800"),
    "tokens that are a text": set_at(["tokens"], "abcde"),
    "a field of meta less": lambda value: value["meta"].pop("codec"),
    "no variant": set_at(["meta", "variant"], None),
    "a number for a name": set_at(["meta", "base"], 3),
    "planes below none": set_at(["meta", "planes"], -1),
    "an unknown decode": set_at(["meta", "decode"], "theirs"),
    "a list": None,
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_malformed_trace_is_refused(value, what, tmp_path):
    bad = copy.deepcopy(value)
    change = HOSTILE[what]
    if change is None:
        bad = [bad]
    else:
        change(bad)
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(DataError, match=r"bad\.json|'half'"):
        read_trace(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}', b"9" * 5000, b'{"format":"deltakeeper.lens","version":NaN}']
)
def test_a_file_that_is_no_json_is_refused(raw, tmp_path):
    (tmp_path / "bad.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"bad\.json"):
        read_trace(tmp_path / "bad.json")


def test_absent_and_oversized_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no lens trace"):
        read_trace(tmp_path / "none.json")
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(DataError, match="larger than 64 MiB"):
        read_trace(tmp_path / "big.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="give another folder"):
        write_trace(make_traces()["half"], tmp_path / "file" / "a.json")


def test_more_cells_than_any_trace_has_are_refused_before_they_are_read(value):
    wide = value | {"layers": list(range(1000)), "positions": list(range(1000))}
    with pytest.raises(DataError, match="more than 262144 cells"):
        from_json(wide, "here")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_any_field_is_read_or_refused(value, data):
    name = data.draw(st.sampled_from(sorted(value)))
    try:
        from_json(value | {name: data.draw(_JSON)}, "here")
    except DataError as error:
        assert str(error).endswith(".")
