"""The manifest as untrusted input: what is well-formed comes back, what is not is refused by the name of the field."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.errors import ArtifactError
from deltakeeper.fingerprint import root_of
from deltakeeper.manifest import Manifest, Source, TensorRecord, TermRecord

LEAF = "ab" * 32
SIGNS = TermRecord("signs", {"bits": 1})
MATRIX = TensorRecord((8, 4), "BF16", "linear", "terms", "m", (8, 4), terms=(SIGNS,), stored_bytes=36, sha256=LEAF)
KEPT = TensorRecord((4,), "F32", "norm", "unchanged", "kept", (4,))
EMBEDDING = TensorRecord((10, 4), "BF16", "embedding", "terms", "embed", (8, 4), terms=(SIGNS,), added_rows=2)
HEAD = TensorRecord((10, 4), "BF16", "head", "tied", tied_to="embed")
EXPERTS = TensorRecord(
    (2, 8, 4), "BF16", "linear", "terms", "x", (2, 8, 4), terms=(TermRecord("signs", {}, 0), TermRecord("signs", {}, 1))
)
NEW = TensorRecord((3,), "F32", "other", "terms", terms=(TermRecord("dense", {"encoding": "value"}),))
RECORDS = {"m": MATRIX, "kept": KEPT, "embed": EMBEDDING, "head": HEAD, "x": EXPERTS, "new": NEW}


def manifest():
    base = dict.fromkeys(("m", "kept", "embed", "x"), LEAF)
    decoded = {name: LEAF for name, record in RECORDS.items() if record.encoding != "tied"}
    return Manifest(
        created_by="deltakeeper 0",
        codec="bitdelta",
        base=Source("org/base", "abc", root_of(base), base),
        target=Source("org/tuned", None, LEAF),
        reconstruction=Source("org/tuned", None, root_of(decoded), decoded),
        exact=True,
        tensors=RECORDS,
        missing=("gone",),
    )


def as_value():
    return json.loads(json.dumps(manifest().to_json()))


def parse(value):
    return Manifest.parse(json.dumps(value).encode(), "here")


def test_what_is_written_is_read_back():
    assert parse(as_value()) == manifest()


def test_shapes_of_terms_are_those_of_the_shared_rows_in_the_codec_orientation():
    assert EMBEDDING.term_shape(SIGNS) == (8, 4)
    assert EXPERTS.term_shape(EXPERTS.terms[0]) == (8, 4)
    assert NEW.term_shape(NEW.terms[0]) == (3,)
    conv = TensorRecord((8, 4), "F32", "linear", "terms", "m", (8, 4), transposed=True, terms=(SIGNS,))
    assert conv.term_shape(SIGNS) == (4, 8)


def test_later_minor_versions_and_unknown_keys_are_read():
    value = as_value() | {"format_version": "1.7", "surprise": [1]}
    value["tensors"]["m"]["colour"] = "red"
    assert parse(value) == manifest()


@pytest.mark.parametrize(
    ("path", "wrong", "named"),
    [
        (("format",), "other", "not the manifest"),
        (("format_version",), "2.0", "use a newer release"),
        (("format_version",), 1.0, "'format_version'"),
        (("codec",), None, "'codec'"),
        (("exact",), "false", "'exact' must be true or false"),
        (("exact",), 1, "'exact' must be true or false"),
        (("exact",), False, "'exact' must be false where a term is 'lowrank', and true elsewhere"),
        (("missing",), "gone", "'missing'"),
        (("tensors",), [], "'tensors' is not an object"),
        (("tensors",), {}, "lists no tensors"),
        (("base", "root"), LEAF, "'base': 'root'"),
        (("base", "leaves"), {"m": "12"}, "'leaves'"),
        (("target", "root"), LEAF.upper(), "'root' must be a SHA-256"),
        (("reconstruction", "root"), "0" * 64, "'reconstruction': 'root'"),
        (("tensors", "m"), None, "'m' is not an object"),
        (("tensors", "m", "shape"), [8.0, 4], "'shape'"),
        (("tensors", "m", "shape"), [-8, 4], "'shape'"),
        (("tensors", "m", "shape"), [True, 4], "'shape'"),
        (("tensors", "m", "shape"), [1 << 30, 1 << 30], "'shape' must be a shape of at most"),
        (("tensors", "m", "shape"), [1] * 9, "'shape'"),
        (("tensors", "m", "shape"), [10, 4], "'added_rows' must be the rows that the base lacks"),
        (("tensors", "m", "dtype"), "F9", "'dtype'"),
        (("tensors", "m", "role"), "spy", "'role'"),
        (("tensors", "m", "encoding"), "xor", "'encoding'"),
        (("tensors", "m", "terms"), [], "'terms'"),
        (("tensors", "m", "terms"), {}, "'terms' must be a list"),
        (("tensors", "m", "terms", 0, "settings"), [], "'settings'"),
        (("tensors", "m", "terms", 0, "slice"), 0, "'terms' must be by slice"),
        (("tensors", "m", "terms", 0, "slice"), "0", "'slice'"),
        (("tensors", "m", "base_shape"), None, "'base_shape'"),
        (("tensors", "m", "base_shape"), [8, 5], "'base_shape'"),
        (("tensors", "m", "base_name"), "elsewhere", "'base_name'"),
        (("tensors", "m", "sha256"), "zz", "'sha256'"),
        (("tensors", "m", "stored_bytes"), -1, "'stored_bytes'"),
        (("tensors", "m", "tied_to"), "embed", "'tied_to'"),
        (("tensors", "kept", "base_shape"), [5], "'added_rows'|'base_shape'"),
        (("tensors", "kept", "transposed"), True, "'transposed'"),
        (("tensors", "kept", "added_rows"), 1, "'added_rows'"),
        (("tensors", "head", "tied_to"), "head", "'tied_to'"),
        (("tensors", "head", "tied_to"), "gone", "'tied_to'"),
        (("tensors", "head", "tied_to"), "m", "'tied_to'"),
        (("tensors", "x", "terms", 1, "slice"), 0, "'terms' must be given for every slice"),
        (("tensors", "x", "terms", 1, "slice"), 2, "'terms' must be of slices"),
        (("tensors", "x", "terms", 1, "slice"), None, "'terms' must be by slice"),
        (("tensors", "new", "added_rows"), 2, "'added_rows'"),
    ],
)
def test_a_malformed_field_is_named(path, wrong, named):
    value = as_value()
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = wrong
    with pytest.raises(ArtifactError, match=named) as caught:
        parse(value)
    assert str(caught.value).startswith("here")


@pytest.mark.parametrize("path", [("reconstruction",), ("base",)])
def test_hashes_must_cover_the_tensors(path):
    value = as_value()
    source = value[path[0]]
    del source["leaves"]["m"]
    source["root"] = root_of(source["leaves"])
    with pytest.raises(ArtifactError, match=r"'leaves'|'base_name'"):
        parse(value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"format": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
        rb'{"\ud800": 1}',
    ],
)
def test_what_is_no_json_is_refused(raw):
    with pytest.raises(ArtifactError, match="here is not JSON"):
        Manifest.parse(raw, "here")


def test_a_name_that_stands_twice_is_refused():
    text = json.dumps(as_value()).replace('"kept": {', '"m": {', 1)
    with pytest.raises(ArtifactError, match="'m' twice"):
        Manifest.parse(text.encode(), "here")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


PLACES = [path for path in places(as_value()) if path]


@given(st.sampled_from(PLACES), anything)
def test_any_value_in_any_place_is_read_or_refused_in_one_sentence(path, junk):
    value = as_value()
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = junk
    try:
        found = parse(value)
    except ArtifactError as error:
        assert re.fullmatch(r"[^\n]+\.", str(error).replace(repr(junk), ""), re.DOTALL) is not None
    else:
        assert Manifest.parse(json.dumps(found.to_json()).encode(), "again") == found
