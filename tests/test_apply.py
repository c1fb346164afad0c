"""Applying a delta: aliases, lies about the base, and a promise that is not kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper.apply import apply_delta, iterate_changes
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError
from deltakeeper.fingerprint import root_of
from deltakeeper.testing import write_pair

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.tensor([[1, 5, 9, 13, 21]])


def edit(folder, change):
    path = folder / "delta_config.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_head_that_equals_the_embedding_but_is_not_tied_is_not_lost(tmp_path):
    from transformers import AutoModelForCausalLM

    base, tuned = write_pair("llama_tied", tmp_path)
    tensors = load_file(tuned / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tuned / "config.json").write_text(json.dumps(config))
    compress(base, tuned, tmp_path / "delta", "dense")
    assert open_artifact(tmp_path / "delta").record(HEAD).tied_to == EMBEDDING
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[HEAD], tensors[HEAD])
    again, true = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (tmp_path / "again", tuned))
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, true(IDS).logits)


@pytest.mark.parametrize(
    "lie",
    [
        {"base_shape": [4000, 48]},
        {"base_name": "model.layers.0.self_attn.v_proj.weight"},
    ],
)
def test_a_lie_about_the_base_shape_is_refused_before_anything_is_decoded(tmp_path, lie, monkeypatch):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    edit(tmp_path / "delta", lambda m: m["tensors"][HEAD].update(lie))
    monkeypatch.setattr("deltakeeper.apply.dense_delta", lambda *_: pytest.fail("decoded"))
    with (
        open_checkpoint(base) as origin,
        pytest.raises(ArtifactError, match=r"base shape of tensor 'lm_head\.weight' is wrong"),
    ):
        next(iterate_changes(origin, open_artifact(tmp_path / "delta")))


def test_a_promise_that_is_not_kept_is_named_and_nothing_is_written(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")

    def promise(manifest):
        manifest["reconstruction"]["leaves"][HEAD] = "0" * 64
        manifest["reconstruction"]["root"] = root_of(manifest["reconstruction"]["leaves"])

    edit(tmp_path / "delta", promise)
    with pytest.raises(ArtifactError, match=r"'lm_head\.weight' does not decode"):
        apply_delta(base, tmp_path / "delta", tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "tuned"]


@pytest.mark.parametrize("codec", ["bitdelta", "svd:rank=2", "magnitude:keep=0.3", "dense"])
def test_tensors_of_three_dimensions_go_slice_by_slice(tmp_path, codec):
    torch.manual_seed(0)
    base = {"experts.weight": torch.randn(3, 32, 40), "norm.weight": torch.ones(40)}
    delta = torch.randn(3, 32, 40) * torch.tensor([1e-3, 1e-2, 0.0]).view(3, 1, 1)
    tuned = base | {"experts.weight": base["experts.weight"] + delta}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", codec)
    record = open_artifact(tmp_path / "delta").record("experts.weight")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")["experts.weight"]
    errors = [(a - t).norm() for a, t in zip(again, tuned["experts.weight"], strict=True)]
    assert all(error < 0.99 * d.norm() for error, d in zip(errors[:2], delta[:2], strict=True))
    assert errors[2] == 0  # an expert that did not change stays as it is
    if codec != "dense":
        assert [term.slice for term in record.terms] == [0, 1, 2]
