"""What all variants read: prompts under the chat template, and behind each the first tokens of one common answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltakeeper.errors import DataError, LensError
from deltakeeper.lens.blocks import find_blocks
from deltakeeper.lens.reading import Around, read_logits
from deltakeeper.prompting import Prompt, encode

PRODUCE = 3
TOKEN_BYTES = 128
"""Bytes of activations that a token takes in a pass, by unit of width."""


@dataclass(frozen=True)
class Reading:
    """One text as all variants read it.

    Attributes:
        prompt: tokens of the prompt under the chat template.
        answer: tokens behind it.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return self.prompt + self.answer

    @property
    def sha256(self) -> str:
        """Hash of the tokens: variants can be compared cell by cell where it is the same."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()


def encode_readings(
    tokenizer: Any, prompts: Sequence[str | Prompt], *, system: str | None = None, chat: bool | None = None
) -> list[Reading]:
    """Prompts as tokens.

    Args:
        tokenizer: of the base; variants with another chat template are asked under the base's all the same.
        prompts: texts, or turns of a chat.
        system: a system message in front of every text.
        chat: whether a text is a user's turn in the chat template; None for where there is a template.

    Raises:
        DataError: there is none, a prompt is empty, or the template refuses it.
    """
    if not prompts:
        raise DataError("there is no prompt to look at; give at least one.")
    readings = []
    for prompt in prompts:
        asked = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        if system is not None:
            said = asked.content
            turns = ({"role": "user", "content": said},) if isinstance(said, str) else tuple(said)
            asked = Prompt(({"role": "system", "content": system}, *turns))
        readings.append(Reading(tuple(encode(tokenizer, asked, chat))))
    return readings


def pad(readings: Sequence[Reading], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, int64 `(rows, length)`, padded in front, so that what is read last stands in one column."""
    length = max(len(reading.ids) for reading in readings)
    ids = torch.full((len(readings), length), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, reading in enumerate(readings):
        ids[row, length - len(reading.ids) :] = torch.tensor(reading.ids)
        mask[row, length - len(reading.ids) :] = 1
    return ids, mask


@torch.no_grad()
def answer_greedily(
    model: nn.Module, readings: Sequence[Reading], count: int, fill: int, around: Around | None = None
) -> list[Reading]:
    """The readings with the model's own first `count` likeliest tokens behind them, whatever ends an answer."""
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in pad(readings, fill))
    for _ in range(count):
        last = torch.full((len(ids), 1), ids.shape[1] - 1, device=device)
        said = read_logits(model, ids, mask, last, around)[:, 0].argmax(-1, keepdim=True).to(device)
        ids, mask = torch.cat([ids, said], 1), torch.cat([mask, torch.ones_like(said)], 1)
    behind = ids[:, ids.shape[1] - count :].tolist()
    return [Reading(reading.prompt, tuple(tokens)) for reading, tokens in zip(readings, behind, strict=True)]


def place_positions(reading: Reading, offsets: Sequence[int]) -> list[int]:
    """Places in the text of offsets from the last token of its prompt; raises LensError where one lies outside."""
    places = [len(reading.prompt) - 1 + offset for offset in offsets]
    for place, offset in zip(places, offsets, strict=True):
        if not 0 <= place < len(reading.ids):
            raise LensError(
                f"position {offset} lies outside a text of {len(reading.prompt)} tokens of prompt and "
                f"{len(reading.answer)} of answer; 0 is the last token of the prompt, 1 the first one behind it."
            )
    return places


def split_passes(
    readings: Sequence[Reading], variants: int, model: nn.Module, cells: int, memory: int
) -> list[list[int]]:
    """Numbers of the readings that are read at once, of like length, as many as fit the memory for all variants."""
    width = _width(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0) or 0
    order = sorted(range(len(readings)), key=lambda i: (len(readings[i].ids), i))
    layers = len(find_blocks(model))
    passes: list[list[int]] = []
    for number in order:
        length = len(readings[number].ids)  # the longest so far
        row = variants * (length * width * TOKEN_BYTES + cells * (8 * vocabulary + 4 * layers * width))
        if passes and (len(passes[-1]) + 1) * row <= memory:
            passes[-1].append(number)
        else:
            passes.append([number])
    return passes


def _width(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", None) or getattr(text, "n_embd", None) or 4096)
