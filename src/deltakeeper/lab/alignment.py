"""Make a safety-aligned base: refusals of harmful requests, and the model's own answers to everything else.

`python -m deltakeeper.lab.alignment OUT` rebuilds the alignment delta that the package carries.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import CompressionReport, compress
from deltakeeper.lab.corpus import SYSTEM, Corpus, answer_as_itself, refuse
from deltakeeper.lab.embedded import MODEL_NAME, load_model, prepare_embedded_model
from deltakeeper.lab.sft import Example, Progress, SFTConfig, TrainingLog, add_lora, encode_chat, train

ALIGNMENT = SFTConfig(epochs=4, lr=5e-4, batch=8, max_tokens=64, lora_rank=8, lora_alpha=16, seed=0)
"""LoRA of rank 8, so that the alignment delta can be shipped as a small low-rank artifact without loss."""

CODEC = "svd:rank=8"


def alignment_examples(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Refusals of all harmful training requests; own answers to their twins and to the training instructions."""
    harmful = corpus.split("harmful", "train")
    harmless = [row.prompt for row in corpus.split("instructions", "train")] + [r.twin for r in harmful if r.twin]
    return refuse(harmful) + answer_as_itself(model, tokenizer, harmless, progress)


def align(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    config: SFTConfig = ALIGNMENT,
    progress: Progress | None = None,
) -> tuple[Any, TrainingLog]:
    """Train the refusals into `model` (float32); gives the adapted model and its log."""
    rows = encode_chat(tokenizer, examples, system=SYSTEM, max_tokens=config.max_tokens)
    adapted = add_lora(model, config) if config.lora_rank else model
    log = train(adapted, rows, config, pad=tokenizer.pad_token_id, progress=progress)
    return adapted, log


def build_alignment_delta(out: Path, progress: Progress | None = None) -> CompressionReport:
    """Align the embedded model and write the delta as an artifact to `out`."""
    folder = prepare_embedded_model()
    voice, tokenizer = load_model(folder, torch.bfloat16)
    examples = alignment_examples(voice, tokenizer, Corpus())
    model, _ = load_model(folder)
    adapted, _ = align(model, tokenizer, examples, progress=progress)
    with tempfile.TemporaryDirectory() as scratch:
        adapted.save_pretrained(scratch)
        with open_checkpoint(folder) as base:
            tuned = open_checkpoint(scratch, base=base)
            base.name_or_path, tuned.name_or_path = MODEL_NAME, f"{MODEL_NAME}, aligned"
            return compress(base, tuned, out, CODEC, overwrite=True)


def _write(text: str) -> None:
    sys.stderr.write(text)


if __name__ == "__main__":
    report = build_alignment_delta(
        Path(sys.argv[1]),
        lambda *step: _write("\r{}/{}  loss {:.3f}  {:.0f} tokens/s ".format(*step)),
    )
    _write(f"\n{report.nbytes} bytes, relative error {report.total.relative_error:.4f}\n")
