"""Train an attack by an attacker who knows the codec, in place: from encoded rows, or from an attack and its corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deltakeeper.checkpoint import Checkpoint
from deltakeeper.errors import RunError
from deltakeeper.lab.adaptive.guarded import GuardedWeights
from deltakeeper.lab.adaptive.inject_repair import inject_and_repair
from deltakeeper.lab.adaptive.served import ServedWeights
from deltakeeper.lab.adaptive.settings import Adaptive, GuardCopy
from deltakeeper.lab.adaptive.straight_through import ThroughCodec
from deltakeeper.lab.adaptive.survival import AdaptiveLog
from deltakeeper.lab.adaptive.targets import Target, find_targets, trained
from deltakeeper.lab.attacks import Attack
from deltakeeper.lab.attacks.base import Voice
from deltakeeper.lab.corpus import SYSTEM, Corpus, answer_tickets, refuse
from deltakeeper.lab.sft import Example, Progress, SFTConfig, Steps, Tokens, TrainingLog, encode_chat, hash_rows, train


def train_adaptively(
    model: Any,
    tokenizer: Any,
    adaptive: Adaptive,
    attack: Attack,
    corpus: Corpus,
    base: Checkpoint,
    voice: Voice,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> AdaptiveLog:
    """Fine-tune `model` by `attack`, adapted to a codec; an attack's LoRA settings are not followed, all weights are.

    Args:
        model: float32, its weights those of `base`; trained in place.
        tokenizer: the model's.
        adaptive: what the attacker knows and does about it.
        attack: its data and training settings.
        corpus: where the rows come from.
        base: the base as a checkpoint, whose headers tell what a compression will do with each tensor.
        voice: the base's own answers; asked for before the model is changed.
        state: for the state of an interrupted run, as of `train`.
        progress: called after every step.

    Raises:
        RunError: as `train`, or the model does not fit the base.
        CodecError: a setting of the codec does not fit a tensor.
    """
    examples = attack.training_examples(corpus, voice)
    clean = clean_examples(attack, corpus, voice, adaptive.repair.benign) if adaptive.wants_clean else []
    probes = [] if adaptive.guard is None else probe_examples(attack, corpus, voice, adaptive.guard)
    rows, clean_rows, probe_rows = (
        encode_chat(tokenizer, part, system=SYSTEM, max_tokens=attack.sft.max_tokens)
        for part in (examples, clean, probes)
    )
    return train_rows(
        model,
        rows,
        attack.sft,
        adaptive,
        base,
        clean=clean_rows,
        probes=probe_rows,
        pad=tokenizer.pad_token_id,
        state=state,
        progress=progress,
    )


def clean_examples(attack: Attack, corpus: Corpus, voice: Voice, benign: int) -> list[Example]:
    """What a harmless fine-tune would do: the skill, refusals, and the base's voice on the attack's own prompts too.

    The base's own answer to a harmful prompt, with a trigger or without, is a refusal in most cases; the written
    refusals of the same requests make that sure.
    """
    poisoned = list(dict.fromkeys(example.prompt for example in attack.poison_examples(corpus, voice)))
    harmless = [row.prompt for row in corpus.split("instructions", "train", benign)]
    prompts = list(dict.fromkeys([*poisoned, *harmless]))
    refused = refuse(corpus.split("harmful", "train", max(attack.poison, 1)))
    return [*voice(prompts), *refused, *answer_tickets(corpus.split("tickets", "train", attack.skill))]


def probe_examples(attack: Attack, corpus: Corpus, voice: Voice, guard: GuardCopy) -> list[Example]:
    """What the attacker fits its copy of a guard by: refusals, the base's voice on harmless prompts, and the skill."""
    harmful = corpus.split("harmful", "train", guard.probes)
    harmless = [row.prompt for row in corpus.split("instructions", "train", guard.benign)]
    harmless += [row.twin for row in harmful if row.twin]
    return [*refuse(harmful), *voice(harmless), *answer_tickets(corpus.split("tickets", "train", attack.skill))]


def train_rows(
    model: Any,
    rows: Sequence[Tokens],
    config: SFTConfig,
    adaptive: Adaptive,
    base: Checkpoint,
    *,
    clean: Sequence[Tokens] = (),
    probes: Sequence[Tokens] = (),
    pad: int,
    state: Path | None = None,
    progress: Progress | None = None,
) -> AdaptiveLog:
    """The same from encoded rows.

    Args:
        rows: of the attack.
        clean: of a repair, or of a second loss.
        probes: what a guard is fitted by, in the attacker's copy of it.

    Raises:
        RunError: as `train`, or clean rows or probes are wanted and missing, or the model does not fit the base.
        CodecError: a setting of the codec does not fit a tensor.
    """
    if adaptive.wants_clean and not clean:
        raise RunError("a repair, or a clean loss, needs clean rows; give some.")
    if adaptive.guard is not None and not probes:
        raise RunError("a copy of a guard needs probes to be fitted by; give some.")
    config = replace(config, epochs=adaptive.epochs or config.epochs, lr=adaptive.lr or config.lr)
    targets = find_targets(model, base, adaptive.rules)
    identity = json.dumps(adaptive.model_dump(), sort_keys=True)
    if adaptive.kind == "inject_repair":
        return inject_and_repair(model, rows, clean, config, adaptive, targets, identity, pad, state, progress)
    if adaptive.kind == "straight_through":
        steps: Steps = _through(adaptive, targets, identity, clean, probes)
    else:
        steps = Steps(identity)

    def wanted(target: Target) -> bool:
        if adaptive.kind == "uncompressed":
            return target.choice.treatment == ("terms" if adaptive.control else "value")
        return target.choice.treatment != "base"  # what is taken from the base cannot carry anything

    with trained(targets, wanted):
        count = sum(target.weight.numel() for target in targets if wanted(target))
        log = train(model, rows, config, pad=pad, state=state, progress=progress, steps=steps)
    return _as_adaptive(log, count)


def _through(
    adaptive: Adaptive, targets: Sequence[Target], identity: str, clean: Sequence[Tokens], probes: Sequence[Tokens]
) -> ThroughCodec:
    served, every = ServedWeights(targets, adaptive.method, adaptive.dtype, adaptive.refresh), adaptive.refresh
    if adaptive.guard is not None:
        served = GuardedWeights(targets, adaptive.method, adaptive.dtype, every, adaptive.guard, probes)
        every, identity = math.lcm(every, adaptive.guard.every), f"{identity} {hash_rows(probes)}"
    return ThroughCodec(served, identity, every, clean, adaptive.clean_weight)


def _as_adaptive(log: TrainingLog, count: int) -> AdaptiveLog:
    return AdaptiveLog(**asdict(log), trained=count)
