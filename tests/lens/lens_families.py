"""Every causal language model of the installed transformers, tiny; and those that are left out, with the reason."""

from __future__ import annotations

from typing import Any

import torch


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = _all(
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads moe_topk "
    "num_global_key_value_heads num_experts_per_tok linear_num_key_heads index_n_heads num_attention_groups",
    2,
)
SIZES |= _all(
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts rotary_dim mamba_n_heads mamba_num_heads "
    "linear_num_value_heads mamba_chunk_size chunk_size qk_rope_head_dim index_topk",
    4,
)
SIZES |= _all(
    "head_dim hidden_size_per_layer_input mamba_d_state state_size ssm_state_size linear_key_head_dim "
    "linear_value_head_dim qk_nope_head_dim v_head_dim index_head_dim dim_head global_head_dim sliding_window",
    8,
)
SIZES |= _all(
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_head mamba_head_dim "
    "q_lora_rank kv_lora_rank",
    16,
)
SIZES |= _all(
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size intermediate_size_mlp n_inner d_inner "
    "dim_ff shared_intermediate_size",
    24,
)
SIZES |= _all(
    "hidden_size n_embd d_model word_embed_proj_dim embedding_size lru_width attention_hidden_size dim_model", 32
)
SIZES |= _all(
    "vocab_size max_position_embeddings n_positions n_ctx max_seq_len vocab_size_per_layer_input mamba_d_ssm", 64
)
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1}

_LATENT = {"qk_rope_head_dim": 8, "num_key_value_heads": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_INKLING = {"swa_head_dim": 8, "rel_extent": 8, "sliding_window_size": 8}
OWN: dict[str, dict[str, Any]] = _all(
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu", _LATENT
)
OWN |= _all("qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next", _LINEAR)
OWN |= {
    "bailing_hybrid": _LINEAR | _LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "ctrl": {"dff": 24},
    "deepseek_v4": {"o_lora_rank": 16},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"final_logit_softcapping": 0.05},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_text": _INKLING | {"unpadded_vocab_size": 64},
    "inkling_text": _INKLING,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": _LINEAR | _LATENT | {"linear_head_dim": 8},
    "lfm2_moe": _CONV,
    "lfm3": _CONV,
    "longcat_flash": _LATENT | {"zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4, "n_groups": 1},
    "qwen4_exp_text": _LINEAR
    | {"hc_lowrank": 8, "ngram_vocab_size_base": 64, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 8,
        "shape_vocab_size": 64,
    },
    "xlm": {"emb_dim": 32},
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0, "head_dim": 8, "hidden_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
    },
}
LARGEST = 350_000
"""Parameters of a model that still counts as tiny."""


def causal_classes() -> dict[str, str]:
    """Class of the causal language model of each family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build_family(kind: str, **more: Any) -> Any:
    """A tiny model of a family, float32; of several modalities, the one that reads text."""
    import transformers

    chosen: Any = transformers.CONFIG_MAPPING[kind]
    text = chosen().get_text_config(decoder=True)
    fields = set(text.to_dict()) | set(getattr(type(text), "__dataclass_fields__", {}))
    settings = {key: value for key, value in SIZES.items() if key in fields} | OWN.get(kind, {}) | more
    config = type(text)(**settings)
    mapped = type(config) in transformers.AutoModelForCausalLM._model_mapping
    make = transformers.AutoModelForCausalLM.from_config if mapped else getattr(transformers, causal_classes()[kind])
    with torch.device("meta"):  # first without memory: what a size is not known for may be as large as the original
        size = sum(p.numel() for p in make(config).parameters())
    assert size <= LARGEST, f"{kind} has {size} parameters"
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start, which would hide one that is lost
                parameter.normal_(std=0.02)
    return model.eval()


def sample_ids(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Tokens of the tiny vocabulary, none of them special."""
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


_NESTED = "its configuration nests settings that no flat table of sizes reaches"
LEFT_OUT: dict[str, str] = {
    "blt": "a patcher and tables of byte hashes, of fixed size: " + _NESTED,
    "cohere_compass_text": "its configuration has no rotary defaults, so that its own defaults do not build",
    "cpmant": "refused: blocks give 32 positions of a prompt in front of the text",
    "dbrx": "the defaults of its nested configuration do not build in this version",
    "dots3_note": _NESTED,
    "dots3_note_text": _NESTED,
    "gemma3n": "as gemma3n_text, with defaults for 35 layers that do not shrink",
    "gemma3n_text": "refused: blocks give four streams in front of the batch axis",
    "gemma4_assistant": "drafts for another model and reads that one's states",
    "git": "a vision tower of fixed size",
    "hrm_text": "refused: two stacks of blocks that run many times in one pass",
    "musicgen": "four codebooks in place of one text",
    "musicgen_melody": "four codebooks in place of one text",
    "phi4_multimodal": "towers for images and sound of fixed size",
    "prophetnet": "refused: blocks give the streams of two future tokens behind the text",
    "qwen4_exp": "its indexer has no default sizes",
    "qwen4_exp_text": "its indexer has no default sizes",
    "reformer": "axial positions tie the length of a text to the width",
    "xlm": "refused: no list of blocks, but one of attentions and one of MLPs",
    "xlnet": "refused: tokens come before the batch axis",
    "xlstm": "sizes of heads that do not shrink",
}
REFUSED = tuple(kind for kind, why in LEFT_OUT.items() if why.startswith("refused"))
