"""The bytes of an artifact do not depend on sharding, on threads, or on which version of the passes ran."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper import encode, open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.layouts import signs
from deltakeeper.testing import write_pair

CODECS = [
    "bitdelta",
    "bitdelta:scale=row,zero=zero",
    "bitdelta:bits=3",
    "svd:rank=3",
    "magnitude",
    "dare",
    "bitdelta+svd:rank=2",
]


def content(folder):
    """Hashes of the payload files, and the manifest without the paths of the models."""
    payload = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}
    manifest = json.loads((folder / "delta_config.json").read_text())
    for source in ("base", "target", "reconstruction"):
        manifest[source].pop("name_or_path")
    return payload, manifest


def reshard(source, target, files):
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors, reverse=True)
    mapping = {name: f"model-{i % files}.safetensors" for i, name in enumerate(names)}
    for file in set(mapping.values()):
        save_file({n: tensors[n] for n in names if mapping[n] == file}, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


@pytest.mark.parametrize("codec", CODECS)
def test_sharding_and_threads_do_not_matter(tmp_path, codec):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "one", codec, workers=1)
    again = reshard(base, tmp_path / "base3", 3), reshard(tuned, tmp_path / "tuned2", 2)
    compress(*again, tmp_path / "many", codec, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "many")


@pytest.mark.parametrize("codec", CODECS[:3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_compiled_passes_give_the_bytes_of_numpy(tmp_path, monkeypatch, codec, dtype):
    base, tuned = write_pair("llama", tmp_path)
    for folder in (base, tuned):
        tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compress(base, tuned, tmp_path / "native", codec)
    monkeypatch.setattr("deltakeeper.native.signs.load_library", lambda: None)
    monkeypatch.setattr(encode, "load_library", lambda: None)
    assert signs.merge_signs([], [], "tensor", None, None, torch.empty(1, 1)) is False
    compress(base, tuned, tmp_path / "plain", codec)
    assert content(tmp_path / "native") == content(tmp_path / "plain")


def test_small_blocks_give_the_same_bytes(tmp_path, monkeypatch):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "large", "bitdelta")
    monkeypatch.setattr(encode, "BLOCK_BYTES", 100)
    compress(base, tuned, tmp_path / "small", "bitdelta")
    assert content(tmp_path / "large") == content(tmp_path / "small")


def test_blocks_cover_a_tensor_once(tmp_path):
    base, _ = write_pair("llama", tmp_path)
    with open_checkpoint(base) as model:
        for name, info in model.tensors.items():
            for nbytes in (1, 100, 10**9):
                parts = [(rows, block.clone()) for rows, block in model.blocks(name, nbytes)]
                assert torch.equal(torch.cat([block for _, block in parts]), model.read(name))
                assert [rows.start for rows, _ in parts] == [0, *(rows.stop for rows, _ in parts)][:-1]
                assert parts[-1][0].stop == info.shape[0]
