"""Tiny models of many architectures, built from configs, and pairs of base and fine-tune with a known delta."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Kind = Literal[
    "llama",
    "llama_tied",
    "llama_odd",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "mistral_window",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gpt2",
    "mixtral",
    "qwen2_moe",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama_tied": {"tie_word_embeddings": True},
    "llama_odd": {"hidden_size": 50, "intermediate_size": 83, "num_attention_heads": 5, "num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 12, "vocab_size": 512, "sliding_window": 8},
    "mistral_window": {"sliding_window": 6},
    "gemma3": {"tie_word_embeddings": True, "head_dim": 12, "vocab_size": 512},
    "gpt_neox": {"num_key_value_heads": None},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40},
}


def build_model(kind: Kind, *, seed: int = 0, vocab_extra: int = 0, settings: Mapping[str, Any] | None = None) -> Any:
    """A randomly initialised tiny decoder of one architecture, float32, in evaluation mode.

    Args:
        kind: the architecture; `llama_tied`, `gemma2` and `gemma3` tie embedding and head, `qwen2` has biases, `gpt2`
            is Conv1D, `llama_odd` has sizes that no word divides and five query heads on one of keys.
        seed: seed of the weights.
        vocab_extra: tokens added to the vocabulary.
        settings: keys of the configuration with other values than these models have.
    """
    import transformers

    torch.manual_seed(seed)
    chosen: dict[str, Any] = _COMMON | _OWN.get(kind, {}) | dict(settings or {})
    chosen["vocab_size"] += vocab_extra
    if kind == "gpt2":
        keep = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        own = {"n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True}
        config: Any = transformers.GPT2Config(**{k: chosen[k] for k in keep}, **own)
    else:
        names = {
            "llama": "LlamaConfig",
            "llama_tied": "LlamaConfig",
            "llama_odd": "LlamaConfig",
            "qwen2": "Qwen2Config",
            "qwen3": "Qwen3Config",
            "gemma2": "Gemma2Config",
            "gemma3": "Gemma3TextConfig",
            "mistral": "MistralConfig",
            "mistral_window": "MistralConfig",
            "phi3": "Phi3Config",
            "olmo2": "Olmo2Config",
            "gpt_neox": "GPTNeoXConfig",
            "mixtral": "MixtralConfig",
            "qwen2_moe": "Qwen2MoeConfig",
        }
        config = getattr(transformers, names[kind])(**{k: v for k, v in chosen.items() if v is not None})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start, which would hide a bias that is lost
                parameter.normal_(std=0.02)
    return model.eval()


def write_pair(
    kind: Kind,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    vocab_extra: int = 0,
    scale: float = 1e-3,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write a tiny base and a fine-tune of it with a known kind of delta; gives both folders.

    The delta is Gaussian of standard deviation `scale` on every tensor but those of the first layer's attention output,
    which stay as they are. `vocab_extra` grows the fine-tune's vocabulary; its shared rows come from the base.
    `settings` are those of `build_model`.
    """
    base = build_model(kind, seed=seed, settings=settings)
    tuned = build_model(kind, seed=seed + 1, vocab_extra=vocab_extra, settings=settings)
    generator = torch.Generator().manual_seed(seed)
    origin = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            rows = len(origin[name])
            parameter[:rows] = origin[name]
            if ".0." not in name or not any(part in name for part in ("o_proj", "attn.c_proj", "attention.dense")):
                parameter[:rows] += torch.randn(origin[name].shape, generator=generator) * scale
    paths = (folder / "base", folder / "tuned")
    for model, path in zip((base, tuned), paths, strict=True):
        model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return paths


def write_tokenizer(folder: Path, words: int = 90) -> None:
    """Put a tokenizer of the words `w0`, `w1`, … behind four special tokens beside a tiny model; no letter is split."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(special | {f"w{i}": 4 + i for i in range(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
