"""Fingerprints against the format's own vectors, whatever the sharding."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.fingerprint import fingerprint, leaf_hash, root_of
from deltakeeper.testing import write_pair
from deltakeeper.verify import verify

A = "9c01ab34a6fa79f27c4a05f01286e6830c53a42663970aa781e747e3d2ee47e8"
B = "b0f26aad014b63975081bb639b21cc082e95d1ef180d78b4ba7df74b3c9a174e"
ROOT = "312c7fe7c273c34f3c7bcfd5fdd45a66c5d02d1f22204a0b800dd3ab81cf60e0"
TENSORS = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)}


def test_the_vectors_of_the_format_hold():
    assert leaf_hash("a", "F32", (2,), TENSORS["a"].numpy().tobytes()) == A
    assert leaf_hash("b", "BF16", (1, 2), TENSORS["b"].view(torch.uint8).numpy().tobytes()) == B
    assert root_of({"b": B, "a": A}) == ROOT


def test_sharding_and_order_do_not_matter_but_every_bit_does(tmp_path):
    for name in ("whole", "split", "flipped"):
        (tmp_path / name).mkdir()
    save_file(dict(reversed(TENSORS.items())), tmp_path / "whole" / "model.safetensors", metadata={"x": "y"})
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / "split" / f"{name}.safetensors")
    flipped = bytearray((tmp_path / "whole" / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "flipped" / "model.safetensors").write_bytes(flipped)
    roots = {}
    for name in ("whole", "split", "flipped"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            roots[name] = fingerprint(checkpoint)
    assert roots["whole"] == roots["split"]
    assert roots["whole"].root == ROOT
    assert roots["flipped"].root != ROOT
    with open_checkpoint(tmp_path / "whole") as checkpoint:
        assert fingerprint(checkpoint, ["a"], threads=1).leaves == {"a": A}


def write_tied(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def leaves_of(folder):
    with open_checkpoint(folder) as checkpoint:
        return fingerprint(checkpoint)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}])
def test_a_tied_head_is_no_leaf_whether_the_file_repeats_it_or_not(tmp_path, config):
    embedding = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    lean = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(32)}
    full = lean | {"lm_head.weight": embedding.clone()}
    same = leaves_of(write_tied(tmp_path / "full", full, **config))
    assert same == leaves_of(write_tied(tmp_path / "lean", lean, **config))
    assert set(same.leaves) == set(lean)


def test_a_head_of_other_bytes_or_one_that_is_declared_untied_is_a_leaf(tmp_path):
    embedding = torch.zeros(40, 32)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    denied = leaves_of(write_tied(tmp_path / "denied", tensors, tie_word_embeddings=False))
    assert set(denied.leaves) == set(tensors)
    tensors["lm_head.weight"][-1, -1] = -0.0  # equal as a number, and yet other bytes
    other = leaves_of(write_tied(tmp_path / "other", tensors, tie_word_embeddings=True))
    assert set(other.leaves) == set(tensors)
    narrow = tensors | {"lm_head.weight": embedding[:8].clone()}
    assert set(leaves_of(write_tied(tmp_path / "narrow", narrow)).leaves) == set(tensors)


def test_an_artifact_fits_its_base_with_and_without_the_repeated_head(tmp_path):
    base, tuned = write_pair("llama_tied", tmp_path)
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    repeated = shutil.copytree(base, tmp_path / "repeated")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, repeated / "model.safetensors"
    )
    for made_from, name in ((base, "lean"), (repeated, "full")):
        compress(made_from, tuned, tmp_path / name, "bitdelta")
    lean, full = open_artifact(tmp_path / "lean").manifest, open_artifact(tmp_path / "full").manifest
    assert lean.base.root == full.base.root == leaves_of(base).root
    assert lean.reconstruction == full.reconstruction
    assert full.missing == ()
    for other in (base, repeated):
        assert verify(tmp_path / "full", other, tuned).ok


def test_an_untied_head_is_a_delta_of_the_embedding_it_came_from(tmp_path):
    base, tuned = write_pair("llama_tied", tmp_path)
    tensors = load_file(tuned / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + torch.full((), 2.0**-9, dtype=torch.bfloat16)
    save_file(tensors | {"lm_head.weight": head}, tuned / "model.safetensors")
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    record = open_artifact(tmp_path / "delta").record("lm_head.weight")
    assert record.base_name == "model.embed_tokens.weight"
    assert record.terms[0].layout == "signs"
    assert verify(tmp_path / "delta", base, tuned).ok
