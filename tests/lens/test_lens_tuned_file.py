"""Files of a tuned lens: what is written comes back, and what is no such file is refused before it takes memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper.errors import BaseMismatchError, DataError
from deltakeeper.lens.tuned import Translators
from deltakeeper.lens.tuned_file import read_translators, write_translators

ROOT = "ab" * 32


def make_lens():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 32, 32, generator=generator), torch.randn(3, 32, generator=generator)
    return Translators(weight, bias, ROOT, 120, "0f" * 32)


def test_a_lens_comes_back_from_its_file(tmp_path):
    lens = make_lens()
    path = tmp_path / "new" / "lens.safetensors"
    write_translators(lens, path)
    found = read_translators(path, base_root=ROOT)
    assert torch.equal(found.weight, lens.weight) and torch.equal(found.bias, lens.bias)
    assert (found.base_root, found.steps, found.text_sha256) == (ROOT, 120, lens.text_sha256)
    assert [p.name for p in path.parent.iterdir()] == ["lens.safetensors"]
    bytes_before = path.read_bytes()
    write_translators(lens, path)
    assert path.read_bytes() == bytes_before
    with pytest.raises(BaseMismatchError, match="train one on this base"):
        read_translators(path, base_root="cd" * 32)
    with pytest.raises(DataError, match="cannot be written"):
        write_translators(lens, path / "below.safetensors")
    with pytest.raises(DataError, match="'steps' is no count"):
        write_translators(Translators.identity(3, 4, ROOT), tmp_path / "untrained.safetensors")


def test_malformed_files_are_refused(tmp_path):
    lens = make_lens()
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    write_translators(lens, good)
    tensors = load_file(good)
    raw = good.read_bytes()
    told = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["tuned_lens"])

    def refuse(match, tensors=tensors, **change):
        save_file(tensors, bad, metadata={"tuned_lens": json.dumps({**told, **change})})
        with pytest.raises(DataError, match=match):
            read_translators(bad)

    refuse("this version", version=2)
    refuse("this version", more=1)
    refuse("this version", format="other")
    for name in ("layers", "width", "steps"):
        for wrong in (0, -1, True, "4", 2.0, 10**12):
            refuse(f"'{name}' is no count", **{name: wrong})
    refuse("its layers and width", layers=2**31 - 1)
    refuse("its layers and width", width=31)
    refuse("no SHA-256", base_root="AB" * 32)
    refuse("no SHA-256", text_sha256="")
    refuse("its layers and width", tensors={"weight": tensors["weight"]})
    refuse("its layers and width", tensors={**tensors, "more": torch.ones(1)})
    refuse("its layers and width", tensors={name: value.half() for name, value in tensors.items()})
    refuse("not finite", tensors={**tensors, "bias": tensors["bias"] * np.inf})
    for content in (b"", b"short", raw[:-4], raw + b"more", raw[:100]):
        bad.write_bytes(content)
        with pytest.raises(DataError, match="no tuned lens can be read"):
            read_translators(bad)
    for metadata in (None, {"tuned_lens": "{"}, {"tuned_lens": "[" * 100_000}, {"tuned_lens": "[]"}):
        save_file(tensors, bad, metadata=metadata)
        with pytest.raises(DataError, match="no sound tuned lens"):
            read_translators(bad)
    with pytest.raises(DataError, match="no tuned lens can be read"):
        read_translators(tmp_path / "absent.safetensors")
    with pytest.raises(DataError, match="no tuned lens can be read"):
        read_translators(tmp_path)
