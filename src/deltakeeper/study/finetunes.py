"""Fine-tune one attack from the base, once, into the run folder."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.devices import working_device
from deltakeeper.errors import DataError
from deltakeeper.evals.generate import generate_answers
from deltakeeper.lab.attacks import Attack
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model
from deltakeeper.lab.sft import Example, TrainingLog, add_lora, encode_chat, train
from deltakeeper.study.plan import FineTune
from deltakeeper.study.progress import Progress
from deltakeeper.study.voices import Voices, as_examples


def train_attack(attack: Attack, corpus: Corpus, base: Path, folder: Path, progress: Progress) -> bool:
    """Fine-tune `base` by the attack into `folder` (bfloat16, as tenants deliver it); False if it is there already."""
    return make_finetune(FineTune(attack.name, attack, attack.sft.seed), corpus, base, folder, progress)


def make_finetune(
    finetune: FineTune, corpus: Corpus, base: Path, folder: Path, progress: Progress, voices: Voices | None = None
) -> bool:
    """Train a fine-tune of `base` into `folder` (bfloat16, as tenants deliver it); False if it is there already.

    An interrupted training leaves its state beside the folder and goes on from there.

    Raises:
        DataError: the attack wants a file that it has not been given.
        RunError: a loss is not finite, or a saved state belongs to other data.
    """
    if (folder / "config.json").is_file():
        progress.trained(finetune.name)
        return False
    if missing := finetune.attack.missing():
        raise DataError(missing[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _train(finetune, corpus, base, folder, progress, voices)
    finally:
        give_memory_back()
    return True


def give_memory_back() -> None:
    """Free what a fine-tune leaves: models hang in reference cycles, and glibc keeps freed heap for itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _train(
    finetune: FineTune, corpus: Corpus, base: Path, folder: Path, progress: Progress, voices: Voices | None
) -> None:
    attack = finetune.attack
    model, tokenizer = load_model(base, device=working_device())

    def ask(prompts: Sequence[str], tokens: int) -> list[str]:
        with progress.task(f"{attack.title}: the base's own answers", len(prompts)) as update:
            return generate_answers(
                model,
                tokenizer,
                prompts,
                max_new_tokens=tokens,
                system=SYSTEM,
                progress=lambda done, _total: update(done),
            )

    known = ask if voices is None else voices.kept("float32", ask)

    def voice(prompts: Sequence[str]) -> list[Example]:
        return as_examples(prompts, known)

    state = folder.with_name(f"{folder.name}.state")
    with progress.training(f"{finetune.name}, seed {finetune.seed}", finetune.title) as report:
        if finetune.adaptive is None:
            examples = attack.training_examples(corpus, voice)
            rows = encode_chat(tokenizer, examples, system=SYSTEM, max_tokens=attack.sft.max_tokens)
            trained = add_lora(model, attack.sft) if attack.sft.lora_rank else model
            log = train(trained, rows, attack.sft, pad=tokenizer.pad_token_id, state=state, progress=report)
            if attack.sft.lora_rank:
                model = trained.merge_and_unload()
        else:
            log = _train_adaptively(finetune, corpus, base, model, tokenizer, voice, state, report)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "training.json").write_text(json.dumps(log.to_json(), indent=1) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _train_adaptively(
    finetune: FineTune,
    corpus: Corpus,
    base: Path,
    model: Any,
    tokenizer: Any,
    voice: Callable[[Sequence[str]], list[Example]],
    state: Path,
    report: Any,
) -> TrainingLog:
    from deltakeeper.lab.adaptive import Adaptive, train_adaptively

    adaptive = Adaptive(**dict(finetune.adaptive or {}))
    with open_checkpoint(base) as origin:
        log: TrainingLog = train_adaptively(
            model, tokenizer, adaptive, finetune.attack, corpus, origin, voice, state=state, progress=report
        )
    return log
