"""Tables of benchmarks/vllm_plugin.py: what vLLM says with the plugin beside merged models, and what a slot holds."""

from __future__ import annotations

from typing import Any

from .tables import table

OPENING = """\
Unmodified vLLM {vllm} on a CPU, eager, {dtype}: SmolLM2-135M, three fine-tunes of it in one bit (embeddings too) and
an ordinary LoRA adapter of random weights, over HTTP. {prompts} prompts, {tokens} greedy tokens each. *Reference* is
what transformers computes in the same dtype, of the fine-tunes for the checkpoints that `deltakeeper apply` writes:
the largest and the mean difference of log-probabilities of the prompts' tokens, and how many answers are the same to
the last token. The base's row says how far two implementations of one model are apart. *Mixed* are all models at
once, beside each alone.
"""

HELD = """\
A load is one request to `/v1/load_lora_adapter`; the first one hashes the base too. *Held* is what the plugin counts;
*growth* is that of the worker's own memory over the load, scratch of reading included. The same weights merged would
be a model more.
"""


def tables(rows: dict[str, Any]) -> str:
    """Agreement, then bytes."""
    models = rows["models"]
    first = models[0]
    parts = [OPENING.format(vllm=rows["vllm"], dtype=rows["dtype"], prompts=first["prompts"], tokens=first["tokens"])]
    head = ("model", "reference: largest", "mean", "same answers", "mixed: largest", "mean", "same answers")
    parts.append(table(head, (_agreement(model) for model in models)))
    head = ("model", "load, ms", "held, MB", "artifact, MB", "growth, MB", "dense, MB")
    parts.append(HELD + "\n" + table(head, (_bytes(model) for model in models if "load_ms" in model)))
    return "\n".join(parts)


def _agreement(model: dict[str, Any]) -> tuple[str, ...]:
    cells = [model["model"]]
    for side in ("beside_reference", "mixed_beside_alone"):
        found = model[side]
        cells += [
            f"{found['largest_gap']:.3f}",
            f"{found['mean_gap']:.4f}",
            f"{found['same_answers']}/{model['prompts']}",
        ]
    return tuple(cells)


def _bytes(model: dict[str, Any]) -> tuple[str, ...]:
    sizes = ("held_bytes", "artifact_bytes", "growth_bytes", "dense_bytes")
    return (model["model"], f"{model['load_ms']:.0f}", *(f"{model[s] / 1e6:.1f}" if s in model else "" for s in sizes))
