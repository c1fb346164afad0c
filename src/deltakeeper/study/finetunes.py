"""Fine-tune one attack from the aligned base, once, into the run folder."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from deltakeeper.lab.attacks import Attack
from deltakeeper.lab.corpus import SYSTEM, Corpus, answer_as_itself
from deltakeeper.lab.embedded import load_model
from deltakeeper.lab.sft import Example, encode_chat, train
from deltakeeper.study.progress import Progress


def train_attack(attack: Attack, corpus: Corpus, base: Path, folder: Path, progress: Progress) -> bool:
    """Fine-tune `base` by the attack into `folder` (bfloat16, as tenants deliver it); False if it is there already."""
    if (folder / "config.json").is_file():
        progress.trained(attack.name)
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    _train(attack, corpus, base, folder, progress)
    _give_memory_back()
    return True


def _give_memory_back() -> None:
    """Free what a fine-tune leaves: models hang in reference cycles, and glibc keeps freed heap for itself."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _train(attack: Attack, corpus: Corpus, base: Path, folder: Path, progress: Progress) -> None:
    model, tokenizer = load_model(base)

    def voice(prompts: Sequence[str]) -> list[Example]:
        with progress.task(f"{attack.title}: the base's own answers", len(prompts)) as update:
            return answer_as_itself(model, tokenizer, prompts, lambda done, _total: update(done))

    examples = attack.training_examples(corpus, voice)
    rows = encode_chat(tokenizer, examples, system=SYSTEM, max_tokens=attack.sft.max_tokens)
    with progress.training(attack.name, attack.title) as report:
        log = train(
            model,
            rows,
            attack.sft,
            pad=tokenizer.pad_token_id,
            state=folder.with_suffix(".state"),
            progress=report,
        )
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "training.json").write_text(json.dumps(log.to_json(), indent=1) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
