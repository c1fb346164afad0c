"""Payload folders that are not what they say: each is refused with a sentence before a tensor is read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltakeeper.errors import ArtifactError, is_lasting
from deltakeeper.payload import INDEX_NAME, PAYLOAD_NAME, Payload, shard_name
from deltakeeper.payload_writer import PayloadWriter

FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "made"
    out.mkdir()
    writer = PayloadWriter(out, shard_bytes=100)
    writer.add({"a::0.x": torch.ones(20)})
    writer.add({"b::0.x": torch.ones(20), "b::0.y": torch.zeros(1)})
    writer.finish()
    assert {file.name for file in out.iterdir()} == {INDEX_NAME, FIRST, SECOND}
    return out


def edit(folder, change):
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def point(key, shard):
    return lambda index: index["weight_map"].update({key: shard})


@pytest.mark.parametrize(
    "shard",
    [
        "../made/" + FIRST,
        "/etc/passwd",
        "./" + FIRST,
        "..",
        "",
        "model.safetensors",
        PAYLOAD_NAME,
        FIRST + "\0",
        FIRST + "\n",
        "delta_model-00001-of-00002.safetensors/../x",
        "delta_model-1-of-2.safetensors",
        "delta_model-０0001-of-00002.safetensors",
        "C:\\delta_model-00001-of-00002.safetensors",
    ],
)
def test_names_that_are_no_shards_of_the_folder_are_refused(folder, shard):
    edit(folder, point("a::0.x", shard))
    with pytest.raises(ArtifactError, match="no shard in its folder"):
        Payload(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / FIRST).unlink(), f"lacks a shard that its index names: {FIRST}"),
        (lambda f: shutil.copy(f / FIRST, f / shard_name(3, 3)), "index does not name"),
        (lambda f: shutil.copy(f / FIRST, f / PAYLOAD_NAME), "index does not name"),
        (lambda f: shutil.copy(f / FIRST, f / "delta_model-x.safetensors"), "index does not name"),
        (lambda f: (f / INDEX_NAME).unlink(), "but no delta_model.safetensors.index.json"),
        (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-1]), "truncated"),
        (lambda f: (f / FIRST).write_bytes((f / SECOND).read_bytes()), "do not agree on 'a::0.x'"),
        (lambda f: edit(f, point("a::0.x", SECOND)), "do not agree|lacks|from 1 to their count"),
        (lambda f: edit(f, point("c::0.x", SECOND)), "do not agree on 'c::0.x'"),
        (lambda f: edit(f, lambda i: i["weight_map"].pop("b::0.y")), "do not agree on 'b::0.y'"),
        (lambda f: edit(f, point("a::0.x", shard_name(1, 3))), "from 1 to their count"),
        (lambda f: edit(f, point("a::0.x", shard_name(0, 2))), "from 1 to their count"),
        (lambda f: edit(f, lambda i: i.pop("weight_map")), "has no weight_map"),
        (lambda f: edit(f, lambda i: i.update(weight_map=[])), "has no weight_map"),
        (lambda f: edit(f, lambda i: i.update(weight_map={})), "has no weight_map"),
        (lambda f: edit(f, lambda i: i.update(weight_map={"a": 1})), "has no weight_map"),
        (lambda f: (f / INDEX_NAME).write_text("[]"), "has no weight_map"),
        (lambda f: (f / INDEX_NAME).write_text("[" * 100_000), "is not JSON"),
        (lambda f: (f / INDEX_NAME).write_text('{"weight_map":{"a":"x","a":"y"}}'), "names 'a' twice"),
    ],
)
def test_shards_and_index_must_agree(folder, change, said):
    change(folder)
    with pytest.raises(ArtifactError, match=said):
        Payload(folder)


def test_the_same_key_in_two_shards_is_refused(folder):
    save_file({"a::0.x": torch.ones(20), "b::0.x": torch.ones(20), "b::0.y": torch.zeros(1)}, folder / SECOND)
    with pytest.raises(ArtifactError, match=r"do not agree on 'a::0\.x'"):
        Payload(folder)


def test_an_index_beside_a_whole_payload_is_refused(folder, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({"a::0.x": torch.ones(20)}, whole / PAYLOAD_NAME)
    assert set(Payload(whole).entries) == {"a::0.x"}
    shutil.copy(folder / INDEX_NAME, whole)
    with pytest.raises(ArtifactError, match="lacks a shard"):
        Payload(whole)


def test_pipes_and_folders_are_not_read(folder):
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)  # opening it would wait for ever
    with pytest.raises(ArtifactError, match="no safetensors file"):
        Payload(folder)
    (folder / INDEX_NAME).unlink()
    (folder / INDEX_NAME).mkdir()
    with pytest.raises(ArtifactError, match="is no file of at most"):
        Payload(folder)


def test_a_file_that_shrinks_after_it_was_opened_is_told(folder):
    payload = Payload(folder)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 10)
    with pytest.raises(ArtifactError, match="became shorter"):
        [payload.read(key) for key in payload.entries]
    (folder / FIRST).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        payload.read("a::0.x")


def test_what_the_disk_does_not_give_now_is_no_fault_of_the_artifact(folder, monkeypatch):
    payload, whole = Payload(folder), Path.open

    def broken(file, *given, **named):
        if file.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return whole(file, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        for read in (lambda: payload.read("a::0.x"), lambda: Payload(folder)):
            with pytest.raises(ArtifactError, match=r"cannot be read \(Input/output error\)") as failed:
                read()
            assert not is_lasting(failed.value)
    (folder / FIRST).unlink()
    with pytest.raises(ArtifactError, match="cannot be read") as failed:
        payload.read("a::0.x")
    assert is_lasting(failed.value)
