"""Fingerprints against the format's own vectors, whatever the sharding."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.fingerprint import fingerprint, leaf_hash, root_of

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
