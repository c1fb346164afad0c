"""Refuse a fine-tune whose configuration computes something else than the base does with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltakeeper.errors import OverlayError
from deltakeeper.manifest_fields import parse_json

CONFIG = "config.json"
MAX_BYTES = 1 << 20

# fmt: off
HARMLESS = frozenset((
    "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "embedding_dropout", "eos_token_id",
    "finetuning_task", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label",
    "initializer_range", "label2id", "max_window_layers", "name_or_path", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "resid_pdrop", "residual_dropout", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "tie_word_embeddings", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "use_cache", "vocab_size",
))
# fmt: on
"""Keys that may differ: they concern training, files, tokens or names, or are looked at elsewhere."""
LENGTHS = frozenset(("max_position_embeddings", "n_positions"))
"""Keys that tell how long a text may be; they act on the computation under `LENGTH_BOUND` rotary positions alone."""
LENGTH_BOUND = ("dynamic", "longrope", "yarn")
UNDECLARED = frozenset(("head_dim", "hidden_act", "rope_scaling", "rope_theta", "sliding_window"))
"""Keys that models read even where their configuration class does not declare them."""
_ABSENT = object()


def check_settings(config: Any, folder: Path) -> bool:
    """Compare a fine-tune's `config.json`, where an artifact has one, with the configuration of the live model.

    Args:
        config: the live model's, of transformers.
        folder: the artifact's.

    Returns:
        Whether the fine-tune's head is its embedding.

    Raises:
        OverlayError: they differ in a key that changes what is computed, which is named.
    """
    file = folder / CONFIG
    if not file.is_file():
        return bool(getattr(config, "tie_word_embeddings", False))
    if file.stat().st_size > MAX_BYTES:
        raise OverlayError(
            f"{file} is larger than {MAX_BYTES} bytes, which no configuration is; get the artifact again."
        )
    raw = parse_json(file.read_bytes(), str(file))
    if not isinstance(raw, dict):
        raise OverlayError(f"{file} is not an object; get the artifact again.")
    ours = config.to_dict()
    if raw.get("model_type", ours.get("model_type")) != ours.get("model_type"):
        raise _refusal(file, "model_type", ours.get("model_type"), raw.get("model_type"))
    # Keys behind which transformers might look up code or kernels are not a fine-tune's to set.
    given = {k: v for k, v in raw.items() if not k.startswith("_") and k not in ("auto_map", "quantization_config")}
    given.pop("attn_implementation", None)
    try:
        theirs = type(config).from_dict(given)
        declared = type(config)().to_dict()
    except Exception as error:
        raise OverlayError(
            f"{file} is no configuration of a {type(config).__name__}: {str(error)[:200]!r}; get the artifact again."
        ) from error
    rope = ours.get("rope_parameters") or {}
    ignored = HARMLESS | (LENGTHS if rope.get("rope_type", "default") not in LENGTH_BOUND else frozenset())
    difference = _first_difference(ours, theirs.to_dict(), ignored, set(declared) | set(ours) | UNDECLARED)
    if difference is not None:
        raise _refusal(file, *difference)
    return bool(getattr(theirs, "tie_word_embeddings", False))


def _first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignored: frozenset[str], known: set[str] | None
) -> tuple[str, Any, Any] | None:
    for key in sorted(set(ours) | set(theirs)):
        if key in ignored or key.startswith("_") or (known is not None and key not in known):
            continue
        mine, other = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            inner = _first_difference(mine, other, ignored, None)
            if inner is not None:
                return f"{key}.{inner[0]}", *inner[1:]
        elif mine != other:
            return key, None if mine is _ABSENT else mine, None if other is _ABSENT else other
    return None


def _refusal(file: Path, key: str, ours: Any, theirs: Any) -> OverlayError:
    return OverlayError(
        f"{file} sets '{key}' to {str(theirs)[:100]} where the base has {str(ours)[:100]}, which changes what is "
        "computed; serve this fine-tune from a base of its own."
    )
