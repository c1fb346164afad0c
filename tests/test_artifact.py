"""The artifact as untrusted input: altered, truncated, lying and foreign folders are each one sentence."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.artifact_writer import ArtifactWriter
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError, DeltakeeperError
from deltakeeper.fingerprint import root_of
from deltakeeper.manifest import Manifest
from deltakeeper.testing import write_pair

PACKED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base, tuned = write_pair("llama", folder, vocab_extra=2)
    compress(base, tuned, folder / "delta", "bitdelta:scale=row")
    return folder


@pytest.fixture
def delta(made, tmp_path):
    return shutil.copytree(made / "delta", tmp_path / "delta")


def edit(folder, change):
    path = folder / "delta_config.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_whole_artifact_opens_and_tells_its_sizes(delta):
    artifact = open_artifact(delta)
    files = {f.name: f.stat().st_size for f in delta.iterdir()}
    card = files.pop("README.md")
    assert set(files) == {"delta_config.json", "delta_model.safetensors", "delta_report.json", "config.json"}
    assert artifact.nbytes == sum(files.values()) and artifact.side_bytes == card
    (delta / "tokenizer.json").write_text("12345678")
    assert artifact.nbytes == sum(files.values()) and artifact.side_bytes == card + 8
    assert artifact.full_bytes == 2 * artifact.weights
    with pytest.raises(ArtifactError, match="has no tensor 'nope'"):
        artifact.record("nope")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["delta_config.json", "delta_model.safetensors"])
def test_truncated_files_are_refused(delta, name, share):
    path = delta / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ArtifactError, match=r"again|truncated"):
        open_artifact(delta)


def test_a_value_of_another_dtype_than_the_record_says_is_refused(delta):
    def change(value):
        record = next(r for r in value["tensors"].values() if r["role"] == "norm" and r["encoding"] == "terms")
        record["terms"][0]["settings"]["dtype"] = "float16"

    edit(delta, change)
    raw = (delta / "delta_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    value = json.loads((delta / "delta_config.json").read_text())
    name = next(n for n, r in value["tensors"].items() if r["role"] == "norm" and r["encoding"] == "terms")
    header[f"{name}::0.delta"]["dtype"] = "F16"
    text = json.dumps(header, separators=(",", ":")).encode()
    (delta / "delta_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ArtifactError, match="is not BF16"):
        open_artifact(delta)


def test_missing_files_are_refused(delta, tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no delta_config\.json"):
        open_artifact(tmp_path)
    (delta / "delta_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(delta)


def test_any_flipped_payload_byte_is_found_and_nothing_is_written(made, delta, tmp_path):
    path = delta / "delta_model.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    for offset in (start, (start + len(raw)) // 2, len(raw) - 1):
        altered = bytearray(raw)
        altered[offset] ^= 4
        path.write_bytes(altered)
        with pytest.raises(ArtifactError, match=r"payload of tensor '.+' was altered"):
            apply_delta(made / "base", delta, tmp_path / "again")
        assert not (tmp_path / "again").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta"]


def set_in(path, value):
    def change(manifest):
        target = manifest
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def settled(change):
    """The same lie, with hashes that agree with it."""

    def both(manifest):
        change(manifest)
        stored = [name for name, record in manifest["tensors"].items() if record["encoding"] != "tied"]
        leaves = {name: manifest["reconstruction"]["leaves"].get(name, "0" * 64) for name in stored}
        manifest["reconstruction"] |= {"leaves": leaves, "root": root_of(leaves)}

    return both


RECORD = ("tensors", PACKED)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_in(("format",), "other"), "not the manifest"),
        (set_in(("format_version",), "2.0"), "use a newer release"),
        (set_in(("format_version",), 1), "'format_version' must be"),
        (set_in(("tensors",), {}), "lists no tensors"),
        (set_in(("tensors",), []), "not an object"),
        (set_in(("base", "root"), "zz"), "'root' must be"),
        (set_in(("base", "leaves"), {"a": 1}), "'leaves' must be"),
        (set_in(("exact",), "yes"), "true or false"),
        (set_in((*RECORD, "shape"), [2**40, 2**40]), "'shape' must be"),
        (set_in((*RECORD, "shape"), [80, -1]), "'shape' must be"),
        (set_in((*RECORD, "shape"), [160, 48]), "must be"),
        (set_in((*RECORD, "dtype"), "F17"), "'dtype' must be"),
        (set_in((*RECORD, "encoding"), "pickle"), "'encoding' must be"),
        (set_in((*RECORD, "encoding"), "unchanged"), "'terms' must be"),
        (set_in((*RECORD, "terms"), []), "'terms' must be"),
        (set_in((*RECORD, "terms", 0, "layout"), "zip"), "unknown layout"),
        (set_in((*RECORD, "terms", 0, "settings"), {}), PACKED),
        (set_in((*RECORD, "terms", 0, "settings"), 3), "'settings' must be"),
        (set_in((*RECORD, "terms", 0, "settings", "planes"), True), PACKED),
        (set_in((*RECORD, "terms", 0, "slice"), 0), "by slice"),
        (set_in((*RECORD, "terms", 0, "slice"), "x"), "'slice' must be"),
        (set_in((*RECORD, "transposed"), 1), "true or false"),
        (set_in((*RECORD, "base_shape"), [3, 3]), "base_shape"),
        (set_in((*RECORD, "base_shape"), None), "base_shape"),
        (set_in((*RECORD, "added_rows"), 80), "added_rows"),
        (set_in((*RECORD, "added_rows"), 5), "must be|missing"),
        (set_in((*RECORD, "tied_to"), "lm_head.weight"), "'tied_to' must be"),
        (set_in((*RECORD, "stored_bytes"), 1), "size of tensor"),
        (set_in((*RECORD, "sha256"), "0" * 64), "was altered"),
        (lambda m: m["tensors"].pop(PACKED), "'leaves' must be"),
        (settled(lambda m: m["tensors"].pop(PACKED)), "belongs to no tensor"),
        (
            settled(lambda m: m["tensors"].update(ghost=copy.deepcopy(m["tensors"][PACKED]))),
            "payload 'ghost::0.* is missing",
        ),
    ],
)
def test_a_lying_manifest_is_refused(delta, change, said):
    edit(delta, change)
    with pytest.raises(DeltakeeperError, match=said):
        open_artifact(delta).terms(PACKED)


def test_ties_must_point_somewhere(delta):
    edit(
        delta,
        lambda m: m["tensors"].update(
            alias={"shape": [1], "dtype": "F32", "role": "head", "encoding": "tied", "tied_to": "gone"}
        ),
    )
    with pytest.raises(ArtifactError, match="'alias': 'tied_to' must be a stored tensor"):
        open_artifact(delta)


def test_unknown_keys_of_the_same_major_version_are_ignored(delta):
    edit(delta, lambda m: m.update(format_version="1.9", novelty={"x": 1}))
    assert open_artifact(delta).terms(PACKED)


def test_a_manifest_that_is_too_large_is_not_read(delta, monkeypatch):
    monkeypatch.setattr("deltakeeper.artifact.MAX_BYTES", 100)
    with pytest.raises(ArtifactError, match="larger than 100"):
        open_artifact(delta)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_json_in_any_field_is_read_or_refused(made, data):
    value = json.loads((made / "delta" / "delta_config.json").read_text())
    target = value
    for _ in range(data.draw(st.integers(0, 4))):
        key = data.draw(st.sampled_from(sorted(target)))
        if not isinstance(target[key], dict) or not target[key]:
            break
        target = target[key]
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    try:
        Manifest.parse(json.dumps(value).encode(), "manifest")
    except ArtifactError as error:
        assert str(error).startswith("manifest")


@given(st.binary(max_size=100) | JSON.map(lambda v: json.dumps(v).encode()))
def test_random_bytes_are_no_manifest(raw):
    with pytest.raises(ArtifactError):
        Manifest.parse(raw, "manifest")


def test_an_existing_artifact_survives_a_failed_replacement(made, delta):
    before = {f.name: f.read_bytes() for f in delta.iterdir()}
    with pytest.raises(ZeroDivisionError), ArtifactWriter(delta, overwrite=True):
        raise ZeroDivisionError
    assert {f.name: f.read_bytes() for f in delta.iterdir()} == before
    assert [p.name for p in delta.parent.iterdir()] == ["delta"]
