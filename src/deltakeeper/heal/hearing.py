"""What a model says at the learned positions of a batch of lessons, and what the teachers said there."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltakeeper.calibration.inputs import load_decoder
from deltakeeper.devices import working_device
from deltakeeper.errors import CheckpointError
from deltakeeper.heal.lessons import Batch, Lesson, Teacher, pack, stack
from deltakeeper.heal.teacher import alone

Pack = Callable[[Sequence[Lesson], int], Batch]
CLOSE = 0.05
"""How far, relative to their size, logits of packed and of single exchanges may be apart: bfloat16 rounds by less."""


def say(model: Any, batch: Batch, embeddings: torch.Tensor | None = None) -> torch.Tensor:
    """Logits at the learned positions, `(positions, vocabulary)`, in the model's dtype.

    Args:
        model: a decoder of transformers.
        batch: the exchanges.
        embeddings: input embeddings `(rows, tokens, width)` in the place of those of the tokens.
    """
    device = model.device
    given: dict[str, Any] = {"position_ids": batch.positions.to(device), "use_cache": False}
    if batch.mask is not None:
        given["attention_mask"] = batch.mask.to(device, model.dtype)
    if embeddings is None:
        given["input_ids"] = batch.ids.to(device)
    else:
        given["inputs_embeds"] = embeddings
    at = batch.at.to(device)
    if len(batch.ids) == 1 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        found: torch.Tensor = model(**given, logits_to_keep=at).logits[0]
    else:
        found = model(**given).logits.flatten(0, 1)[at]
    return found


@torch.no_grad()
def choose_pack(model: Any, lessons: Sequence[Lesson], shared: int) -> Pack:
    """`pack` where the model says the same of exchanges in one row as of each alone, else `stack`.

    Raises:
        CheckpointError: the model says something that is not finite.
    """
    few = lessons[:3]
    alone = torch.cat([say(model, stack([lesson], shared)) for lesson in few]).float()
    if not bool(torch.isfinite(alone).all()):
        raise CheckpointError("a model gives logits that are not finite on the lessons; it is broken.")
    try:
        packed = say(model, pack(few, shared)).float()
    except (ValueError, TypeError, RuntimeError):  # a model that takes no such mask says so in one of these ways
        return stack
    return pack if float((packed - alone).norm()) <= CLOSE * float(alone.norm()) else stack


@dataclass(frozen=True)
class Heard:
    """What a teacher said at each learned position of some lessons.

    Attributes:
        said: by the number of the lesson: inputs of the head `(learned, width)`, or logits where there is no head.
        head: the output head, or None.
    """

    said: dict[int, torch.Tensor]
    head: nn.Linear | None

    @torch.no_grad()
    def logits(self, number: int) -> torch.Tensor:
        """Logits on the answer of a lesson, float32 `(learned, vocabulary)`."""
        found = self.said[number].to(working_device())
        return (found if self.head is None else self.head(found)).float()


@torch.inference_mode()
def hear(
    folder: Path,
    lessons: Sequence[Lesson],
    teacher: Teacher,
    shared: int,
    *,
    rows: int = 16,
    progress: Callable[[int, int, str], None] | None = None,
) -> Heard:
    """Load a teacher, run it over its lessons, keep what it says and let it go.

    Raises:
        CheckpointError: it cannot be loaded, or says something that is not finite.
    """
    numbers = sorted(
        (n for n, lesson in enumerate(lessons) if lesson.teacher == teacher), key=lambda n: len(lessons[n].ids)
    )
    model: Any = load_decoder(folder).to(working_device())
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = alone(head)
    seen: list[torch.Tensor] = []
    handle = None if kept is None else head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    chosen = choose_pack(model, [lessons[n] for n in numbers], shared)
    said: dict[int, torch.Tensor] = {}
    for start in range(0, len(numbers), rows):
        if progress:
            progress(start, len(numbers), teacher)
        part = numbers[start : start + rows]
        batch = chosen([lessons[n] for n in part], shared)
        seen.clear()
        logits = say(model, batch)
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(f"{folder} gives logits that are not finite on the lessons; it is broken.")
        found = logits
        if kept is not None and seen:
            hidden = seen[0].flatten(0, 1)
            found = hidden if len(hidden) == len(batch.at) else hidden[batch.at.to(hidden.device)]
            if start == 0 and not torch.allclose(kept(found).float(), logits.float(), rtol=1e-2, atol=1e-2):
                kept = None  # the model does more behind its head, such as capping its logits
        found = found if kept is not None else logits
        for number, piece in zip(part, torch.split(found, list(batch.counts)), strict=True):
            said[number] = piece.clone()
    if handle is not None:
        handle.remove()
    del model, head
    gc.collect()
    return Heard(said, kept)
