"""Streams of prompts where their answer begins: what directions are fitted on, and judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltakeeper.errors import LensError
from deltakeeper.lens.decode import MEMORY
from deltakeeper.lens.models import Compared
from deltakeeper.lens.readings import Reading, pad, split_passes
from deltakeeper.lens.streams import Streams, capture


def read_streams(
    variants: Compared, tokenizer: Any, readings: Sequence[Reading], *, only: str | None = None, memory: int = MEMORY
) -> dict[str, Tensor]:
    """Streams at the last token of each prompt, by variant.

    Args:
        variants: open.
        tokenizer: of the base.
        readings: prompts as tokens; what stands behind a prompt is not read.
        only: the one variant that is read; all by default.
        memory: bytes that the streams of all prompts may take, and a pass beside them.

    Returns:
        float32 (prompts, layers, width), on the CPU; a model that keeps several streams a token has them side by side.

    Raises:
        LensError: the streams would take more than `memory`.
    """
    names = variants.names if only is None else (only,)
    fill = getattr(tokenizer, "pad_token_id", None) or 0
    asked = [Reading(one.prompt) for one in readings]
    found: dict[str, Tensor] = {}
    with variants.serving(variants.names[0]) as (model, _):
        passes = split_passes(asked, len(names), model, 1, memory)
    for numbers in passes:
        some = [asked[i] for i in numbers]
        places = torch.tensor([[len(one.prompt) - 1] for one in some])
        for name, streams in _capture(variants, only, *pad(some, fill), places).items():
            rows = streams.block[:, :, 0].flatten(2).transpose(0, 1).float().cpu()  # (rows, layers, width)
            if name not in found:
                _check_size((len(names), len(asked), *rows.shape[1:]), memory)
                found[name] = rows.new_empty(len(asked), *rows.shape[1:])
            found[name][numbers] = rows
    return found


def _capture(variants: Compared, only: str | None, ids: Tensor, mask: Tensor, places: Tensor) -> dict[str, Streams]:
    if only is None:
        return variants.capture(ids, mask, places, logits=False)
    with variants.serving(only) as (model, around):
        return {only: capture(model, ids, mask, places, logits=False, around=around)}


def _check_size(shape: tuple[int, ...], memory: int) -> None:
    needed = 4 * math.prod(shape)
    if needed > memory:
        raise LensError(
            f"the streams of {shape[1]} prompts and {shape[0]} variants take {needed} bytes, and {memory} are allowed; "
            "give fewer prompts, or more memory."
        )
