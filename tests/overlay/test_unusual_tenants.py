"""Tenants that change more than packed matrices: tied heads, vocabularies that shrink, biases, norms, routers."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from tenants import family, groups_of, ids, load, logits, mixed
from torch import nn

from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.overlay import attach


def serve(models, artifact, *, rows=2):
    live, tokens = models.live(), ids(rows, vocabulary=90)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    base = logits(live, tokens)
    found = mixed(overlay, [slot, *[0] * (rows - 1)], tokens)
    known = base.shape[-1]
    assert torch.allclose(found[1:, :, :known], base[1:], atol=1e-5)
    return found[0], logits(models.merged(artifact), tokens)[0], base[0]


@pytest.mark.parametrize("embeddings", ["dense", "base", "rtn:bits=8"])
@pytest.mark.parametrize("norms", ["dense", "base"])
def test_what_is_left_to_the_base_or_stored_whole(embeddings, norms, tmp_path):
    models = family("llama_tied", tmp_path)
    found, true, base = serve(models, models.tune("a", "bitdelta", embeddings=embeddings, norms=norms))
    assert torch.allclose(found, true, atol=5e-5) and not torch.allclose(found, base, atol=1e-3)


def untie(model):
    head = nn.Parameter(model.get_input_embeddings().weight.detach().clone() + 0.01)
    model.lm_head.weight = head
    model.config.tie_word_embeddings = False


def tie(model):
    model.lm_head.weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True


@pytest.mark.parametrize("codec", ["bitdelta", "dense"])
@pytest.mark.parametrize(("kind", "edit"), [("llama_tied", untie), ("llama", tie)])
def test_a_head_that_was_tied_or_untied_by_the_fine_tune(kind, edit, codec, tmp_path):
    models = family(kind, tmp_path)
    found, true, base = serve(models, models.tune("a", codec, edit=edit))
    assert torch.allclose(found, true, atol=5e-5) and not torch.allclose(found, base, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gemma2"])
def test_a_vocabulary_that_shrank(kind, tmp_path):
    models = family(kind, tmp_path)
    size = models.live().config.vocab_size
    artifact = models.tune("a", "bitdelta", edit=lambda model: model.resize_token_embeddings(size - 6))
    found, true, _ = serve(models, artifact)
    assert true.shape[-1] == size - 6 and found.shape[-1] == size
    assert torch.allclose(found[:, : size - 6], true, atol=5e-5)
    assert torch.all(found[:, size - 6 :] == -math.inf)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_logits_of_tokens_that_a_tenant_lacks_stay_minus_infinity(kind, tmp_path):
    models = family(kind, tmp_path)
    live, tokens = models.live(), ids(2)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(models.tune("a", "bitdelta", extra=4)))
    found = mixed(overlay, [slot, 0], tokens)
    assert torch.all(found[1, :, -4:] == -math.inf) and torch.all(found[0].isfinite())


def test_biases_of_a_grown_head_and_layer_norms(tmp_path):
    models = family("gpt_neox", tmp_path)

    def shift(model):
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))

    found, true, base = serve(models, models.tune("a", "bitdelta", edit=shift))
    assert torch.allclose(found, true, atol=1e-4) and not torch.allclose(found, base, atol=0.1)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "olmo2"])
@pytest.mark.parametrize("length", [2, 4, 9])  # as many tokens as heads, too
def test_norms_of_heads(kind, length, tmp_path):
    models = family(kind, tmp_path)

    def shift(model):
        for name, parameter in model.named_parameters():
            if "_norm" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))

    artifact = models.tune("a", "bitdelta", edit=shift)
    live = models.live()
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    for rows in (1, 2, 4):
        tokens = ids(rows, length)
        slots = [slot if i % 2 == 0 else 0 for i in range(rows)]
        found = mixed(overlay, slots, tokens)
        true, base = logits(models.merged(artifact), tokens), logits(live, tokens)
        for row, own in enumerate(slots):
            assert torch.allclose(found[row], (true if own else base)[row], atol=1e-4)


def test_routers_and_experts_that_differ_a_lot(tmp_path):
    models = family("mixtral", tmp_path)

    def shift(model):
        for name, parameter in model.named_parameters():
            if "gate.weight" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))

    found, true, base = serve(models, models.tune("a", "bitdelta", edit=shift), rows=3)
    assert torch.allclose(found, true, atol=1e-4) and not torch.allclose(found, base, atol=0.05)


def test_generation_with_a_cache_is_that_of_the_merged_model(tmp_path):
    from transformers import DynamicCache

    models = family("mistral_window", tmp_path)
    artifact = models.tune("a", "bitdelta:bits=2")
    live, tokens = models.live(), ids(2, 8)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    merged = models.merged(artifact)
    found, true = tokens, tokens
    cache = DynamicCache(config=live.config)
    given = tokens
    for _ in range(6):
        slots = [slot, 0]
        with overlay.rows(groups_of(slots, given.shape[1]), head=groups_of(slots, 1)):
            out = live(given, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        given = out.argmax(-1, keepdim=True)
        found = torch.cat([found, given], 1)
        next_true = torch.stack([logits(merged, true[:1])[0, -1], logits(live, true[1:])[0, -1]]).argmax(
            -1, keepdim=True
        )
        true = torch.cat([true, next_true], 1)
    assert torch.equal(found, true)


@pytest.mark.parametrize("codec", ["bitdelta", "dense"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_checkpoints_that_hold_fused_experts(kind, codec, tmp_path):
    models = family(kind, tmp_path)
    tuned = models.tune("a", "bitdelta").path.parent / "mine"
    for folder in (models.base, tuned):
        tensors = {name: value.contiguous() for name, value in load(folder).state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compress(models.base, tuned, tmp_path / "fused" / "delta", codec)
    artifact = open_artifact(tmp_path / "fused" / "delta")
    assert any(len(record.shape) == 3 for record in artifact.manifest.tensors.values())
    found, true, base = serve(models, artifact, rows=3)
    assert torch.allclose(found, true, atol=5e-5) and not torch.allclose(found, base, atol=1e-3)
