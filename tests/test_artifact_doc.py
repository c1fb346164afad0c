"""The specification proved: its vectors hold, and its reader gives the bytes that deltakeeper gives."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deltakeeper.apply import iterate_merged
from deltakeeper.artifact import hash_payload, open_artifact
from deltakeeper.artifact_writer import ArtifactWriter, as_bytes
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.codecs import CODECS
from deltakeeper.compress import compress
from deltakeeper.fingerprint import leaf_hash, root_of
from deltakeeper.layouts import LAYOUTS, BitMask, GapMask, GroupedInt, SeedMask, Sparse, TwoFourMask
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.layouts.codes import pack_codes
from deltakeeper.layouts.gain import split_gain
from deltakeeper.layouts.masks import MASKS
from deltakeeper.layouts.philox import philox, philox_key
from deltakeeper.safetensors_header import DTYPES

DOCS = Path(__file__).resolve().parent.parent / "docs"
NEEDS = {"svd": "svd:rank=3"}
MORE = (
    "bitdelta:bits=3,scale=row,zero=zero",
    "bitdelta:scale=column,zero=minus",
    "bitdelta+svd:rank=2",
    "svd:rank=2,factors=bfloat16",
    "magnitude:keep=0.01",
    "magnitude:keep=0.4,values=bfloat16",
    "dare:p=0.5,values=float32",
    "rtn:bits=3,symmetric=false",
    "rtn:bits=8,group=0,scale=float32",
    "deltazip:keep=0.3,pattern=unstructured",
    "magnitude:keep=0.2+rtn:bits=2",
)


def load_reader():
    spec = importlib.util.spec_from_file_location("read_artifact", DOCS / "read_artifact.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READER = load_reader()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base in float16, bfloat16 and float32, and a fine-tune with every kind of tensor that an artifact knows."""
    folder, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator).to(dtype)

    base = {
        "transformer.wte.weight": draw(40, 33),
        "transformer.h.0.attn.c_attn.weight": draw(34, 39),  # Conv1D: stored transposed
        "transformer.h.0.mlp.experts.gate_up_proj": draw(2, 33, 37),
        "transformer.h.0.mlp.half.weight": draw(33, 38, dtype=torch.float16),
        "transformer.h.0.mlp.full.weight": draw(33, 300, dtype=torch.float32),  # wide: gaps need an escape
        "transformer.h.0.mlp.same.weight": draw(33, 36),
        "transformer.h.0.mlp.kept.bias": torch.arange(5),
        "transformer.ln_f.weight": draw(32),
    }
    tuned = {n: t + (0.02 * draw(*t.shape)).to(t.dtype) if t.is_floating_point() else t for n, t in base.items()}
    tuned["transformer.h.0.mlp.same.weight"] = base["transformer.h.0.mlp.same.weight"]
    tuned["transformer.h.0.mlp.half.weight"][3] = base["transformer.h.0.mlp.half.weight"][3]  # a row of zeros
    tuned["transformer.wte.weight"] = torch.cat([tuned["transformer.wte.weight"], draw(3, 33)])
    tuned["lm_head.weight"] = tuned["transformer.wte.weight"].clone()
    tuned["transformer.h.0.new.weight"] = draw(3)
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def ours(base, delta):
    with open_checkpoint(base) as origin:
        for name, tensor in iterate_merged(origin, open_artifact(delta)):
            yield name, bytes(as_bytes(tensor.contiguous()))


def as_float(dtype, array):
    return READER.widen(dtype, array).astype(np.float64)


def test_the_reader_is_short_and_needs_numpy_alone():
    text = (DOCS / "read_artifact.py").read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 80
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, flags=re.M))
    assert imported == {"hashlib", "json", "pathlib", "numpy"}


@pytest.mark.parametrize("codec", [*(NEEDS.get(name, name) for name in CODECS), *MORE])
def test_the_reader_gives_the_bytes_that_deltakeeper_gives(models, tmp_path, codec):
    compress(models / "base", models / "tuned", tmp_path / "delta", codec)
    artifact = open_artifact(tmp_path / "delta")
    expected = dict(ours(models / "base", tmp_path / "delta"))
    seen = set()
    for name, dtype, array in READER.read(models / "base", tmp_path / "delta"):
        record = artifact.record(name)
        assert (dtype, array.shape) == (record.dtype, record.shape)
        seen.add(name)
        if any(term.layout == "lowrank" for term in record.terms):
            true = np.frombuffer(expected[name], READER.TYPES[dtype]).reshape(array.shape)
            step = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-22}[dtype]
            np.testing.assert_allclose(as_float(dtype, array), as_float(dtype, true), rtol=2 * step, atol=1e-6)
        else:
            assert array.tobytes() == expected[name], name
            leaf = hashlib.sha256(f"{name}\0{dtype}\0{','.join(map(str, array.shape))}\0".encode() + array.tobytes())
            assert leaf.hexdigest() == artifact.manifest.reconstruction.leaves[name]
    assert seen == set(expected)


def test_all_layouts_were_read(models, tmp_path):
    """The codecs above exercise each layout, mask and kind of value; a new one has to be added to reader and page."""
    seen = set()
    for i, codec in enumerate([*(NEEDS.get(name, name) for name in CODECS), *MORE]):
        compress(models / "base", models / "tuned", tmp_path / f"delta-{i}", codec)
        for record in open_artifact(tmp_path / f"delta-{i}").manifest.tensors.values():
            for term in record.terms:
                seen.add(term.layout)
                seen |= {f"mask {term.settings[k]}" for k in ("mask",) if k in term.settings}
                seen |= {f"values {term.settings[k]}" for k in ("values",) if k in term.settings}
                seen |= {f"factors {term.settings[k]}" for k in ("factors",) if k in term.settings}
    assert seen >= set(LAYOUTS) | {f"mask {kind}" for kind in MASKS} | {"values sign", "values int", "factors packed"}


def test_the_reader_reads_shards(models, tmp_path, monkeypatch):
    monkeypatch.setattr(ArtifactWriter.__init__, "__kwdefaults__", {"shard_bytes": 500})
    compress(models / "base", models / "tuned", tmp_path / "delta", "bitdelta")
    assert len(list((tmp_path / "delta").glob("*-of-*.safetensors"))) > 2
    expected = dict(ours(models / "base", tmp_path / "delta"))
    assert {name: array.tobytes() for name, _, array in READER.read(models / "base", tmp_path / "delta")} == expected


def test_the_reader_refuses_another_base(models, tmp_path):
    compress(models / "base", models / "tuned", tmp_path / "delta", "bitdelta")
    with pytest.raises(AssertionError, match="another base"):
        list(READER.read(models / "tuned", tmp_path / "delta"))


def vectors():
    [block] = re.findall(r"```json\n(.*?)```", (DOCS / "artifact.md").read_text(encoding="utf-8"), flags=re.S)
    return json.loads(block)


VECTORS = vectors()


def unhex(dtype, shape, text):
    return np.frombuffer(bytes.fromhex(text), READER.TYPES[dtype]).reshape(shape)


class TestVectors:
    def test_hashes(self):
        leaves = {}
        for name, dtype, shape, data, leaf in VECTORS["leaves"]:
            assert leaf_hash(name, dtype, shape, bytes.fromhex(data)) == leaf
            dims = ",".join(map(str, shape))
            assert hashlib.sha256(f"{name}\0{dtype}\0{dims}\0".encode() + bytes.fromhex(data)).hexdigest() == leaf
            leaves[name] = leaf
        assert root_of(leaves) == VECTORS["root"]
        assert (
            hashlib.sha256(bytes.fromhex("".join(leaves[name] for name in sorted(leaves)))).hexdigest()
            == VECTORS["root"]
        )
        parts = {key: bytes.fromhex(data) for key, data in VECTORS["payload_hash"]["parts"].items()}
        assert hash_payload(parts) == VECTORS["payload_hash"]["sha256"]
        whole = b"".join(key.encode() + b"\0" + data for key, data in sorted(parts.items()))
        assert hashlib.sha256(whole).hexdigest() == VECTORS["payload_hash"]["sha256"]

    @pytest.mark.parametrize("vector", VECTORS["bits"], ids=lambda v: f"{v['bits']} bits")
    def test_packed_codes(self, vector):
        bits, codes, raw = vector["bits"], vector["codes"], bytes.fromhex(vector["bytes"])
        stream = int.from_bytes(raw, "little")  # the first code in the lowest bits, all padding above the last
        assert [stream >> bits * i & (1 << bits) - 1 for i in range(len(codes))] == codes
        assert stream >> bits * len(codes) == 0 and len(raw) == 4 * math.ceil(bits * len(codes) / 32)
        assert bytes(as_bytes(pack_codes(torch.tensor([codes], dtype=torch.uint8), bits))) == raw
        words = np.frombuffer(raw, "i4")[None]
        assert READER.unpack(words, bits, len(codes))[0].tolist() == codes

    @pytest.mark.parametrize("vector", VECTORS["philox"], ids=lambda v: str(v["key"]))
    def test_philox(self, vector):
        key = tuple(vector["key"])
        assert [f"{word:08x}" for word in philox(key, vector["counter"], 1)[0]] == vector["words"]
        if "seed" in vector:
            assert philox_key(vector["seed"], vector["tensor"]) == key

    def test_gaps(self):
        vector = VECTORS["gaps"]
        kept = torch.zeros(len(vector["kept"]), vector["columns"], dtype=torch.bool)
        for row, columns in enumerate(vector["kept"]):
            kept[row, columns] = True
        mask = GapMask.from_words(pack_bits(kept), vector["columns"])
        assert bytes(as_bytes(mask.gaps)).hex() == vector["delta_gaps"]
        assert mask.row_bytes.tolist() == vector["delta_row_bytes"]
        part = {
            "delta_gaps": unhex("U8", -1, vector["delta_gaps"]),
            "delta_row_bytes": np.array(vector["delta_row_bytes"]),
        }
        assert np.array_equal(READER.mask({"mask": "gaps"}, tuple(kept.shape), part.get), kept.numpy())

    @pytest.mark.parametrize("vector", VECTORS["gain"], ids=lambda v: str(v["values"]))
    def test_gain(self, vector):
        stored, gain = split_gain(torch.tensor(vector["values"]), getattr(torch, vector["dtype"]))
        assert bytes(as_bytes(stored)).hex() == vector["stored"] and gain == vector["gain"]
        peak = max(map(abs, vector["values"]))
        assert math.frexp(gain)[0] == 0.5 and (peak == 0 or peak / 2 <= gain <= peak)

    @pytest.mark.parametrize(("exact", "near"), VECTORS["rounding"])
    def test_rounding(self, exact, near):
        number = np.array([int(exact, 16)], "u4").view("f4")
        assert bytes(as_bytes(torch.from_numpy(number).bfloat16()))[::-1].hex() == near

    @pytest.mark.parametrize("vector", VECTORS["terms"], ids=lambda v: f"{v['layout']} {list(v['settings'].values())}")
    def test_terms(self, vector):
        shape, settings = tuple(vector["shape"]), vector["settings"]
        parts = {suffix: (spec[0], unhex(*spec)) for suffix, spec in vector["payload"].items()}
        tensors = {
            suffix: torch.frombuffer(bytearray(array.tobytes()), dtype=DTYPES[dtype]).view(array.shape)
            for suffix, (dtype, array) in parts.items()
        }
        term = LAYOUTS[vector["layout"]].from_tensors(shape, settings, tensors)
        expected = np.array(vector["dense"], "f4")
        assert term.to_dense().float().numpy().tobytes() == expected.tobytes()
        assert term.settings() == settings and set(term.tensors()) == set(tensors)
        found = READER.dense(vector["layout"], settings, shape, lambda suffix: READER.widen(*parts[suffix]))
        assert found.astype("f4").tobytes() == expected.tobytes()

    def test_all_layouts_and_masks_have_one(self):
        terms = VECTORS["terms"]
        assert {term["layout"] for term in terms} == set(LAYOUTS)
        masks = {term["settings"].get("mask", "gaps") for term in terms}
        assert masks == set(MASKS)


def layouts_of(rows, columns):
    """Terms of every layout with each of its settings, of one random matrix."""
    generator = torch.Generator().manual_seed(columns)
    matrix = torch.randn(rows, columns, generator=generator) * 1e-6
    words = pack_bits(torch.rand(rows, columns, generator=generator) < 0.3)
    kept = [BitMask(words), GapMask.from_words(words, columns), SeedMask(2**64 - 1, "ä", 0.37)]
    kept.append(SeedMask(3, "w", torch.linspace(0, 1, rows)))
    kept.append(TwoFourMask.from_words(two_of_four(rows, columns), columns))
    for bits in range(1, 9):
        for group in (0, 1, 8, 1000):
            for symmetric in (True, False):
                scale = "float16" if bits % 2 else "float32"
                yield GroupedInt.from_matrix(matrix, bits, group, symmetric=symmetric, scale_dtype=scale)
    for mask in kept:
        for values in ("float16", "bfloat16", "float32"):
            yield Sparse.from_matrix(matrix, mask, values)
        yield Sparse.from_signs(matrix, mask, 0.1)
        for bits in range(2, 9):
            codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).to(
                torch.int8
            )
            yield Sparse.from_codes(codes, torch.tensor([1e-3]), mask, bits=bits)
            yield Sparse.from_codes(codes, torch.linspace(1e-9, 2, rows)[:, None], mask, bits=bits)


def two_of_four(rows, columns):
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    for start in range(0, columns, 4):
        keep[:, start : start + 2] = True
    return pack_bits(keep)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 35), (5, 64), (4, 777)])
def test_every_setting_of_every_element_wise_layout_decodes_to_the_same_bytes(rows, columns):
    for term in layouts_of(rows, columns):
        names = {dtype: name for name, dtype in DTYPES.items()}
        parts = {
            s: (names[t.dtype], unhex(names[t.dtype], t.shape, bytes(as_bytes(t)).hex()))
            for s, t in term.tensors().items()
        }
        found = READER.dense(
            term.name, term.settings(), term.shape, lambda suffix, parts=parts: READER.widen(*parts[suffix])
        )
        assert found.astype("f4").tobytes() == term.to_dense().numpy().tobytes(), (term.name, term.settings())
