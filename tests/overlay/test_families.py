"""Architectures with a turn of their own: norms of another formula, activations that learn, routers of every kind."""

from __future__ import annotations

import pytest
import torch
import transformers
from tenants import ids, load, logits, mixed

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.errors import OverlayError
from deltakeeper.overlay import attach

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 40, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SERVED = {
    "Apertus": {},
    "Bloom": {"n_head": 4, "n_layer": 2},
    "Cohere2": {"layer_types": ["full_attention"] * 2},
    "DeepseekV3": EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Falcon": {"new_decoder_architecture": True},
    "Gemma": {"head_dim": 12, "tie_word_embeddings": True},
    "Nemotron": {},
    "Olmo": {},
    "Olmoe": EXPERTS,
    "Phi": {},
    "Phimoe": EXPERTS,
    "Qwen3Moe": EXPERTS | {"head_dim": 12},
    "StableLm": {"partial_rotary_factor": 0.5},
}
REFUSED = {
    "GptOss": EXPERTS | {"head_dim": 12, "layer_types": ["full_attention"] * 2},
    "OPT": {"ffn_dim": 80, "word_embed_proj_dim": 48},
}


def write(family, settings, folder):
    config = getattr(transformers, f"{family}Config")(**(COMMON | settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, scale in (("base", 0.05), ("tuned", 0.02)):
        with torch.no_grad():
            for parameter in model.parameters():
                if name == "tuned" or parameter.ndim == 1:
                    parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale
        model.save_pretrained(folder / name)
    compress(folder / "base", folder / "tuned", folder / "delta", "bitdelta")
    return load(folder / "base"), open_artifact(folder / "delta")


@pytest.mark.parametrize("family", SERVED)
def test_each_row_is_its_tenants(family, tmp_path):
    live, artifact = write(family, SERVED[family], tmp_path)
    merged = load(apply_delta(tmp_path / "base", artifact, tmp_path / "merged"))
    tokens = ids(3)
    base, true = logits(live, tokens), logits(merged, tokens)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    found = mixed(overlay, [slot, 0, slot], tokens)
    assert torch.allclose(found[::2], true[::2], atol=1e-4) and torch.allclose(found[1], base[1], atol=1e-5)
    assert (true - base).abs().max() > 0.01
    assert torch.allclose(mixed(overlay, [slot], tokens[:1])[0], found[0], atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_what_has_no_place_is_refused_by_name(family, tmp_path):
    live, artifact = write(family, REFUSED[family], tmp_path)
    overlay = attach(live)
    with pytest.raises(OverlayError, match=r"no place where tensor 'model.*(experts|embed_positions)"):
        overlay.load(artifact)
    assert not overlay.published
