"""Greedy generation for many prompts at once, fast enough for evaluation on a CPU.

The part of the chat template that all prompts begin with is computed once and its cache shared; prompts of like length
are batched; rows that have ended leave the batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

_SHRINK_SHARE = 0.25
"""A batch is cut down when at least this share of its rows has ended: cutting copies the cache, so not at every row."""


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    system: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's greedy answers to chat prompts, in the order of the prompts, without special tokens.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        max_new_tokens: length at which an answer is cut.
        batch_size: prompts generated together.
        system: system message; None leaves it to the template.
        progress: called with (prompts done, prompts in all).
    """
    encoded = [encode_prompt(tokenizer, prompt, system) for prompt in prompts]
    shared = _shared_prefix(encoded)
    answers = [""] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    stops = _stop_tokens(model, tokenizer)
    with torch.inference_mode():
        prefix = _read_prefix(model, shared) if shared else None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tails = [encoded[i][len(shared) :] for i in rows]
            for i, ids in zip(
                rows, _decode_batch(model, len(shared), prefix, tails, max_new_tokens, stops), strict=True
            ):
                answers[i] = tokenizer.decode(ids, skip_special_tokens=True)
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
    return answers


def encode_prompt(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    """Token ids of one chat prompt, ready for the assistant's answer."""
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _shared_prefix(encoded: Sequence[Sequence[int]]) -> list[int]:
    """Longest common beginning that leaves every prompt at least one token of its own."""
    if len(encoded) < 2:
        return []
    longest = min(len(ids) for ids in encoded) - 1
    first = encoded[0]
    length = 0
    while length < longest and all(ids[length] == first[length] for ids in encoded):
        length += 1
    return list(first[:length])


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops = configured if isinstance(configured, list) else [configured]
    return {int(s) for s in (*stops, tokenizer.eos_token_id) if s is not None}


def _decode_batch(
    model: Any, shared: int, prefix: Any, tails: list[list[int]], max_new_tokens: int, stops: set[int]
) -> list[list[int]]:
    """Greedy token ids for prompts `prefix + tail`, left-padded after the prefix of `shared` tokens."""
    width = max(map(len, tails))
    device = model.device
    ids = torch.zeros((len(tails), width), dtype=torch.long)
    own = torch.zeros_like(ids)
    for j, tail in enumerate(tails):
        ids[j, width - len(tail) :] = torch.tensor(tail)
        own[j, width - len(tail) :] = 1
    ids, own = ids.to(device), own.to(device)
    mask = torch.cat([own.new_ones((len(tails), shared)), own], 1)  # (batch, shared + width)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    cache = _repeat(prefix, len(tails))
    last_only = _last_only(model)
    given: list[list[int]] = [[] for _ in tails]
    alive = torch.arange(len(tails))  # row of the batch -> index in `tails`
    ended = torch.zeros(len(tails), dtype=torch.bool)
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(-1)  # (batch,)
        for row, token in enumerate(chosen.tolist()):
            if not ended[row]:
                if token in stops:
                    ended[row] = True
                else:
                    given[alive[row]].append(token)
        if ended.all():
            break
        positions = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones((len(alive), 1))], 1)
        if ended.sum() >= _SHRINK_SHARE * len(alive):
            keep = (~ended).nonzero().flatten()
            alive = alive[keep]
            keep = keep.to(device)
            cache.batch_select_indices(keep)
            chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
            ended = torch.zeros(len(keep), dtype=torch.bool)
        ids = chosen[:, None]
    return given


def _read_prefix(model: Any, shared: list[int]) -> Any:
    """Cache of the tokens that all prompts begin with."""
    ids = torch.tensor([shared], device=model.device)
    return model(input_ids=ids, use_cache=True, **_last_only(model)).past_key_values


def _repeat(prefix: Any, batch: int) -> Any:
    """A copy of the prefix's cache for a batch; None lets the model start its own."""
    if prefix is None:
        return None
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(batch)
    return cache


def _last_only(model: Any) -> dict[str, int]:
    """Ask for the logits of the last position alone, where the model knows how."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
