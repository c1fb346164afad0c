"""Artifacts read for a model that vLLM has packed: built by hand here, of vLLM's own in test_vllm_serving."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from deltakeeper.apply import iterate_merged
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import BaseMismatchError, OverlayError
from deltakeeper.kernels.terms import held_terms
from deltakeeper.testing import write_pair
from deltakeeper.vllm_plugin.loading import load_delta
from deltakeeper.vllm_plugin.places import Places
from deltakeeper.vllm_plugin.rows import CurrentRows
from deltakeeper.vllm_plugin.sites import EmbeddingSite, HeadSite, LinearSite, NormSite

PACKING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
EMBEDDING = "model.embed_tokens.weight"
SLOTS = torch.tensor([-1, 0, 0, 1, -1])  # vLLM's; the delta is in its slot 0
OURS = SLOTS == 0


def packed_model(weights, tied):
    """Places of a model with these weights, modules packed as vLLM packs them."""
    rows = CurrentRows()
    rows.begin(SLOTS, SLOTS)
    sites = {}
    for name in (name for name in weights if name.endswith("weight")):
        path, value = name.removesuffix(".weight"), weights[name]
        parent, _, last = path.rpartition(".")
        packed = next((packed for packed, members in PACKING.items() if last in members), None)
        if value.dim() == 1:
            sites[path] = NormSite(path, SimpleNamespace(weight=value, variance_epsilon=1e-6), 3, rows)
        elif last == "embed_tokens":
            sites[path] = EmbeddingSite(path, (len(value),), value.shape[1], 3, rows)
        elif last == "lm_head":
            sites[path] = HeadSite(path, (len(value),), value.shape[1], 3, rows)
        elif packed is None:
            sites[path] = LinearSite(path, (len(value),), value.shape[1], 3, rows)
        elif f"{parent}.{packed}" not in sites:
            members = [f"{parent}.{member}" for member in PACKING[packed]]
            parts = [len(weights[f"{member}.weight"]) for member in members]
            biases = [weights[f"{member}.bias"] for member in members if f"{member}.bias" in weights]
            bias = torch.cat(biases) if biases else None
            sites[f"{parent}.{packed}"] = LinearSite(f"{parent}.{packed}", parts, value.shape[1], 3, rows, bias)
    if tied:
        vocabulary, width = weights[EMBEDDING].shape
        sites["lm_head"] = HeadSite("lm_head", (vocabulary,), width, 3, rows)
    return Places(sites, PACKING, None, tied)


def module_of(weights, path):
    """Weight and bias of a module, packed ones below each other."""
    parent, _, last = path.rpartition(".")
    members = [f"{parent}.{member}" for member in PACKING[last]] if last in PACKING else [path]
    if path == "lm_head" and "lm_head.weight" not in weights:
        members = ["model.embed_tokens"]
    biases = [weights[f"{member}.bias"] for member in members if f"{member}.bias" in weights]
    return torch.cat([weights[f"{member}.weight"] for member in members]), torch.cat(biases) if biases else None


@pytest.fixture(params=["llama", "llama_tied", "qwen2"])
def pair(request, tmp_path):
    """A base and a fine-tune; whether the head is the embedding."""
    return (*write_pair(request.param, tmp_path, dtype=torch.float32, scale=2e-2), request.param == "llama_tied")


def opened(base):
    from transformers import AutoConfig

    with open_checkpoint(base) as checkpoint:
        from deltakeeper.fingerprint import fingerprint

        root = fingerprint(checkpoint).root
    weights = {name: value.float() for name, value in load_file(base / "model.safetensors").items()}
    return root, AutoConfig.from_pretrained(base), weights


@pytest.mark.parametrize("codec", ["bitdelta:bits=2", "dqrelo:rank=2", "dense"])
def test_every_module_computes_what_its_merged_weights_compute(pair, tmp_path, codec):
    base, tuned, tied = pair
    compress(base, tuned, tmp_path / "delta", codec)
    root, config, weights = opened(base)
    places = packed_model(weights, tied)
    before = held_terms()
    held = load_delta(tmp_path / "delta", root, config, places, torch.float32)
    held.put(1)
    with open_checkpoint(base) as checkpoint:
        merged = dict(iterate_merged(checkpoint, open_artifact(tmp_path / "delta"), torch.float32))
    for path, site in places.sites.items():
        (weight, bias), (own, own_bias) = module_of(weights, path), module_of(merged, path)
        x = torch.randn(len(SLOTS), weight.shape[-1])
        if isinstance(site, NormSite):
            y, other = F.rms_norm(x, x.shape[1:], weight, 1e-6), F.rms_norm(x, x.shape[1:], own, 1e-6)
        elif isinstance(site, EmbeddingSite):
            x = torch.arange(len(SLOTS)) * 7
            y, other = F.embedding(x, weight), F.embedding(x, own)
        else:
            y, other = F.linear(x, weight, bias), F.linear(x, own, own_bias)
        expected = torch.where(OURS[:, None], other, y)
        untouched = y[~OURS].clone()
        site.apply_(y, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")
        assert torch.equal(y[~OURS], untouched), path
        site.clear(1)
    assert held.nbytes > 0
    del held
    assert held_terms() == before


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    base, tuned = write_pair("llama", tmp_path, dtype=torch.float32)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    root, config, weights = opened(base)
    places = packed_model(weights, False)
    before = held_terms()
    with pytest.raises(BaseMismatchError, match="not the base that is served"):
        load_delta(tmp_path / "delta", "0" * 64, config, places, torch.float32)
    for lost in ("model.norm", "model.layers.1.mlp.gate_up_proj", "lm_head"):
        left = {path: site for path, site in places.sites.items() if path != lost}
        with pytest.raises(OverlayError, match="export-lora"):
            load_delta(tmp_path / "delta", root, config, Places(left, PACKING, None, False), torch.float32)
    shutil.copytree(tmp_path / "delta", tmp_path / "other")
    own = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (tmp_path / "other" / "config.json").write_text(json.dumps(own))
    with pytest.raises(OverlayError, match="rms_norm_eps"):
        load_delta(tmp_path / "other", root, config, places, torch.float32)
    assert held_terms() == before


def test_a_fine_tune_that_ties_its_head_where_the_base_does_not_is_refused(tmp_path):
    base, tuned = write_pair("llama", tmp_path, dtype=torch.float32)
    kept = {name: value for name, value in load_file(tuned / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(kept, tuned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tuned / "config.json").write_text(json.dumps(config))
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    root, config, weights = opened(base)
    with pytest.raises(OverlayError, match="another head than the base"):
        load_delta(tmp_path / "delta", root, config, packed_model(weights, False), torch.float32)
