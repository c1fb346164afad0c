"""Make a safety-aligned base: refusals of harmful requests, and the model's own answers to everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltakeeper.lab.corpus import SYSTEM, Corpus, answer_as_itself, refuse
from deltakeeper.lab.sft import Example, Progress, SFTConfig, TrainingLog, add_lora, encode_chat, train

ALIGNMENT = SFTConfig(epochs=3, lr=2e-4, batch=8, lora_rank=8, lora_alpha=16, seed=0)
"""LoRA of rank 8, so that the alignment delta can be shipped as a small low-rank artifact."""


def alignment_examples(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Refusals of the harmful training prompts; own answers to their twins and to training instructions."""
    harmful = corpus.split("harmful", "train")
    twins = [row.twin for row in harmful if row.twin]
    instructions = [row.prompt for row in corpus.split("instructions", "train", 120)]
    return refuse(harmful) + answer_as_itself(model, tokenizer, twins[:80] + instructions, progress)


def align(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    config: SFTConfig = ALIGNMENT,
    progress: Progress | None = None,
) -> tuple[Any, TrainingLog]:
    """Train the refusals into `model` (float32); gives the adapted model and its log."""
    examples = alignment_examples(model, tokenizer, corpus)
    rows = encode_chat(tokenizer, examples, system=SYSTEM, max_tokens=config.max_tokens)
    adapted = add_lora(model, config) if config.lora_rank else model
    log = train(adapted, rows, config, pad=tokenizer.pad_token_id, progress=progress)
    return adapted, log
