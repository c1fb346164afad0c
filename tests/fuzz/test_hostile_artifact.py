"""Altered artifacts of every kind: they are read or refused with a sentence, in memory that their size justifies."""

from __future__ import annotations

import json
import shutil

import hostile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltakeeper.errors import ArtifactError, CheckpointError, DeltakeeperError
from deltakeeper.manifest import Manifest
from deltakeeper.safetensors_header import read_header

MANIFEST, PAYLOAD = "delta_config.json", "delta_model.safetensors"
QUIET = {"suppress_health_check": list(HealthCheck)}
RANDOMS = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return hostile.make_artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def read_or_refuse(folder):
    """True if it was read whole; anything but a DeltakeeperError or too much memory fails."""
    try:
        with hostile.no_more_memory_than(hostile.size_of(folder)), hostile.hashes_agree():
            hostile.read_everything(folder)
    except DeltakeeperError as error:
        text = str(error)
        assert text.endswith(".") and len(text) < 3000 and text.isprintable(), text
        return False
    return True


def dump(value, draw):
    """JSON text, now and then with a name twice, a bare NaN, in another encoding, or its end cut off."""
    text = json.dumps(value)
    how = draw.choice(["plain"] * 6 + ["twice", "nan", "cut", "utf16"])
    if how == "twice" and len(text) > 2:
        return ("{" + text[1:-1] + "," + text[1:-1] + "}").encode()
    if how == "nan":
        return text.replace("1", "NaN", 1).encode()
    return text.encode("utf-16") if how == "utf16" else text[: -3 if how == "cut" else None].encode()


def test_the_whole_ones_are_read(artifacts):
    for folder in artifacts:
        with hostile.no_more_memory_than(hostile.size_of(folder)):
            hostile.read_everything(folder)


def test_the_watch_on_memory_sees_both_kinds_of_arrays():
    import numpy as np
    import torch

    for make in (lambda: np.zeros(hostile.SLACK + 1000, np.uint8), lambda: torch.zeros(hostile.SLACK // 4 + 1000)):
        with pytest.raises(AssertionError, match="bytes of input"), hostile.no_more_memory_than(0):
            make()


@settings(max_examples=250, **QUIET)
@given(draw=RANDOMS)
def test_manifests_with_any_value_in_any_place(artifacts, scratch, draw):
    source = draw.choice(artifacts)
    folder = shutil.copytree(source, scratch / "manifest", dirs_exist_ok=True)
    value = json.loads((source / MANIFEST).read_text())
    hostile.alter_json(value, draw)
    raw = dump(value, draw)
    (folder / MANIFEST).write_bytes(raw)
    (folder / PAYLOAD).write_bytes((source / PAYLOAD).read_bytes())
    read_or_refuse(folder)
    try:
        Manifest.parse(raw, "manifest")
    except ArtifactError as error:
        assert str(error).startswith("manifest")


@settings(max_examples=300, **QUIET)
@given(draw=RANDOMS)
def test_records_of_one_tensor(artifacts, scratch, draw):
    source = draw.choice(artifacts)
    folder = shutil.copytree(source, scratch / "record", dirs_exist_ok=True)
    value = json.loads((source / MANIFEST).read_text())
    packed = [record for record in value["tensors"].values() if record["terms"]]
    record = draw.choice(packed)
    hostile.alter_json(draw.choice([record, record["terms"]]), draw)
    (folder / MANIFEST).write_bytes(json.dumps(value).encode())
    read_or_refuse(folder)


@settings(max_examples=200, **QUIET)
@given(draw=RANDOMS)
def test_headers_with_any_value_in_any_place(artifacts, scratch, draw):
    source = draw.choice(artifacts)
    folder = shutil.copytree(source, scratch / "header", dirs_exist_ok=True)
    header, payload = hostile.split((source / PAYLOAD).read_bytes())
    hostile.alter_json(header, draw)
    (folder / PAYLOAD).write_bytes(hostile.join(dump(header, draw), payload))
    read_or_refuse(folder)
    try:
        read_header(folder / PAYLOAD)
    except CheckpointError as error:
        assert str(error).startswith(str(folder / PAYLOAD))


@settings(max_examples=150, **QUIET)
@given(draw=RANDOMS)
def test_offsets_that_lie(artifacts, scratch, draw):
    source = draw.choice(artifacts)
    folder = shutil.copytree(source, scratch / "offsets", dirs_exist_ok=True)
    header, payload = hostile.split((source / PAYLOAD).read_bytes())
    entries = [entry for key, entry in header.items() if key != "__metadata__"]
    for _ in range(draw.randint(1, 3)):
        entry, other = draw.choice(entries), draw.choice(entries)
        how = draw.choice(["move", "overlap", "swap", "shape", "dtype"])
        if how == "move":
            entry["data_offsets"][draw.randint(0, 1)] += draw.choice([draw.randint(-70, 70), 2**31, 2**64, -(2**63)])
        elif how == "overlap":
            entry["data_offsets"] = list(other["data_offsets"])
        elif how == "shape":
            entry["shape"] = [draw.randint(0, 80) for _ in range(draw.randint(0, 9))]
        elif how == "dtype":
            entry["dtype"] = draw.choice(["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F4"])
        else:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    (folder / PAYLOAD).write_bytes(hostile.join(json.dumps(header).encode(), payload))
    read_or_refuse(folder)


@settings(max_examples=150, **QUIET)
@given(draw=RANDOMS)
def test_payload_bytes_and_lengths(artifacts, scratch, draw):
    source = draw.choice(artifacts)
    folder = shutil.copytree(source, scratch / "payload", dirs_exist_ok=True)
    raw = bytearray((source / PAYLOAD).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    how = draw.choice(["bytes", "ones", "length", "cut", "grown"])
    if how == "bytes":
        for _ in range(draw.randint(1, 20)):
            raw[draw.randrange(start, len(raw))] = draw.randrange(256)
    elif how == "ones":
        at, end = draw.randrange(start, len(raw)), draw.randrange(start, len(raw))
        raw[at:end] = b"\xff" * len(raw[at:end])
    elif how == "length":
        raw[:8] = draw.choice([0, 1, start - 9, start, len(raw), 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif how == "cut":
        del raw[draw.randrange(len(raw)) :]
    else:
        raw += bytes(draw.randint(1, 100))
    (folder / PAYLOAD).write_bytes(raw)
    read_or_refuse(folder)


@settings(max_examples=200)
@given(raw=st.binary(max_size=200), start=st.sampled_from([b"", b"{", b'{"a":', b"\xff\xfe"]))
def test_random_bytes_are_no_file_of_any_kind(tmp_path_factory, raw, start):
    folder = tmp_path_factory.getbasetemp() / "random"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(start + raw)
    assert not read_or_refuse(folder)
    (folder / "x").write_bytes(len(start + raw).to_bytes(8, "little") + start + raw)
    with pytest.raises(CheckpointError), hostile.no_more_memory_than(300):
        read_header(folder / "x")


@pytest.mark.parametrize("depth", [31, 33, 200, 900, 5_000, 100_000])
def test_deep_nests_are_refused(artifacts, tmp_path, depth):
    folder = shutil.copytree(artifacts[0], tmp_path / "deep")
    for name in (MANIFEST, PAYLOAD):
        raw = (artifacts[0] / name).read_bytes()
        deep = b'"deep":' + b"[" * depth + b"]" * depth + b","
        if name == MANIFEST:
            (folder / name).write_bytes(b"{" + deep + raw[1:])
        else:
            _, payload = hostile.split(raw)
            (folder / name).write_bytes(hostile.join(b"{" + deep[:-1] + b"}", payload))
        assert not read_or_refuse(folder) or (name == MANIFEST and depth <= 31)
        (folder / name).write_bytes(raw)
