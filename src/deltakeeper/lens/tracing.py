"""Traces of many variants on many prompts: everyone reads the same tokens, and each layer is decoded once.

The text is the prompt under the base's chat template and behind it the first tokens of one answer, the base's own if no
other is given. A pass has several prompts of all variants; a chunk of layers of all variants is in memory at once, so
that divergences between them come from whole distributions. Nothing is returned before every variant's last layer gave
its logits and a plain pass gave once more what it gave before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from deltakeeper.errors import LensError
from deltakeeper.lens.decode import MEMORY
from deltakeeper.lens.models import Compared
from deltakeeper.lens.readings import PRODUCE, answer_greedily, encode_readings, pad, place_positions, split_passes
from deltakeeper.lens.targets import known_openers
from deltakeeper.lens.trace import LensTrace, TraceMeta
from deltakeeper.lens.trace_batch import TOP
from deltakeeper.lens.trace_pass import DecodeWith, Seconds, Tracing, Translators, timed, trace_pass
from deltakeeper.prompting import Prompt

PROBE = 2
"""Prompts that are read before and after."""


def trace_prompts(
    variants: Compared,
    tokenizer: Any,
    prompts: Sequence[str | Prompt],
    *,
    system: str | None = None,
    chat: bool | None = None,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    targets: Mapping[str, Sequence[int]] | None = None,
    tuned: str | None = None,
    references: Sequence[str] | None = None,
    decoder: DecodeWith = "own",
    translators: Translators | None = None,
    translated_by: str = "a tuned lens",
    top: int = TOP,
    memory: int = MEMORY,
    produce: int = PRODUCE,
    answers: Sequence[Sequence[int]] | None = None,
    whose: str | None = None,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    seconds: Seconds | None = None,
) -> dict[str, list[LensTrace]]:
    """Trace every variant on the same tokens.

    Args:
        variants: open, the base first.
        tokenizer: of the base.
        prompts: texts, or turns of a chat.
        system: a system message in front of every text.
        chat: whether a text goes into the chat template; None for where there is one.
        positions: counted from the last token of the prompt, which is 0; it and all behind it by default.
        layers: numbers of the layers; all by default.
        targets: token ids by name of a set; openings of refusals and of agreement by default.
        tuned: name of the fine-tune.
        references: variants that all are measured against; base and fine-tune by default.
        decoder: `own` decodes with each variant's own tail, `base` with the base's, so that only streams differ.
        translators: of a tuned lens, which read streams before the tail does.
        translated_by: its name and hash; goes into every trace.
        top: how many of the likeliest tokens each cell keeps.
        memory: bytes that a pass, and a chunk of layers of all variants, may take beside the models.
        produce: how many tokens of the base's own answer are read behind each prompt.
        answers: tokens to be read behind each prompt in their place.
        whose: whose answers these are; goes into every trace.
        about: by variant, further fields of `TraceMeta`: `delta`, `codec`, `planes`; `base` for all under the base.
        progress: called with prompts done and prompts in all.
        seconds: wall time is added to it, by stage.

    Returns:
        By variant, one trace a prompt, in their order. The target `produced` is what each variant would say next.

    Raises:
        LensError: a position, layer or name does not exist; or the lens of a variant's last layer is not what it says.
        DataError: a prompt cannot be encoded.
    """
    base, spent = variants.names[0], {} if seconds is None else seconds
    for name in (*(references or ()), *((tuned,) if tuned else ())):
        if name not in variants.names:
            raise LensError(f"there is no variant '{name}'; name one of {', '.join(variants.names)}.")
    readings = encode_readings(tokenizer, prompts, system=system, chat=chat)
    fill = getattr(tokenizer, "pad_token_id", None) or 0
    if answers is not None:
        readings = [replace(one, answer=tuple(ids)) for one, ids in zip(readings, answers, strict=True)]
    length = produce if answers is None else min(len(ids) for ids in answers)
    offsets = tuple(range(length + 1)) if positions is None else tuple(sorted(set(positions)))
    if targets is None:
        targets = known_openers(tokenizer)
    how = Tracing(
        offsets,
        None if layers is None else tuple(sorted(set(layers))),
        tuple(dict.fromkeys([base, *([tuned] if tuned else [])] if references is None else references)),
        tuned,
        targets,
        decoder,
        translators,
        top,
        memory // 2,
    )
    found: dict[str, list[LensTrace | None]] = {name: [None] * len(readings) for name in variants.names}
    done = 0
    with variants.serving(base) as (model, around):
        passes = split_passes(readings, len(variants.names), model, len(offsets), how.memory)
        template = getattr(tokenizer, "chat_template", None)
        meta = TraceMeta(
            variant=base,
            base=str(getattr(model.config, "name_or_path", "")),
            prompt="",
            text=("prompt" if not length else f"{base}, its likeliest tokens") if answers is None else whose or "given",
            decode=decoder,
            decoder="logit lens" if translators is None else translated_by,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            template=hashlib.sha256(str(template).encode()).hexdigest() if template and chat is not False else None,
        )
        with timed(spent, "answer"):
            for numbers in passes if answers is None and produce else ():
                said = answer_greedily(model, [readings[i] for i in numbers], produce, fill, around)
                for number, reading in zip(numbers, said, strict=True):
                    readings[number] = reading
    metas = {
        name: replace(meta, variant=name, **{**dict((about or {}).get(base, {})), **dict((about or {}).get(name, {}))})
        for name in variants.names
    }
    spell = _speller(tokenizer)
    probe = readings[:PROBE]
    with timed(spent, "check"):
        places = torch.tensor([place_positions(reading, how.offsets) for reading in probe])
        before = variants.capture(*pad(probe, fill), places)
    for numbers in passes:
        traces = trace_pass(variants, [readings[i] for i in numbers], how, metas, fill, spell, spent)
        for name, own in traces.items():
            for place, trace in zip(numbers, own, strict=True):
                found[name][place] = trace
        done += len(numbers)
        if progress is not None:
            progress(done, len(readings))
    with timed(spent, "check"):
        variants.check_identity(before)  # a plain pass must give what it gave before all this, to the bit
    return {name: [trace for trace in own if trace is not None] for name, own in found.items()}


def _speller(tokenizer: Any) -> Callable[[int], str]:
    def spell(token: int) -> str:
        return str(tokenizer.decode([token]))

    return spell
