"""Greedy generation for many prompts at once, fast enough for evaluation on a CPU.

The part of the chat template that all prompts begin with is computed once and its cache shared; prompts of like length
are batched; rows that have ended leave the batch.
"""

from __future__ import annotations

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
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tails = [encoded[i][len(shared) :] for i in rows]
            for i, ids in zip(rows, _decode_batch(model, shared, tails, max_new_tokens, stops), strict=True):
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
    model: Any, shared: list[int], tails: list[list[int]], max_new_tokens: int, stops: set[int]
) -> list[list[int]]:
    """Greedy token ids for prompts `shared + tail`, left-padded between the shared part and the tail."""
    width = max(map(len, tails))
    ids = torch.zeros((len(tails), width), dtype=torch.long)
    own = torch.zeros_like(ids)
    for j, tail in enumerate(tails):
        ids[j, width - len(tail) :] = torch.tensor(tail)
        own[j, width - len(tail) :] = 1
    mask = torch.cat([torch.ones((len(tails), len(shared)), dtype=torch.long), own], 1)  # (batch, shared + width)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, len(shared) :]
    cache = _prefill(model, shared, len(tails))
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
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
        mask = torch.cat([mask, torch.ones((len(alive), 1), dtype=torch.long)], 1)
        if ended.sum() >= _SHRINK_SHARE * len(alive):
            keep = (~ended).nonzero().flatten()
            cache.batch_select_indices(keep)
            chosen, mask, positions, alive = chosen[keep], mask[keep], positions[keep], alive[keep]
            ended = torch.zeros(len(keep), dtype=torch.bool)
        ids = chosen[:, None]
    return given


def _prefill(model: Any, shared: list[int], batch: int) -> Any:
    """Cache of the shared prefix, repeated for a batch; None lets the model start its own."""
    if not shared:
        return None
    cache = model(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(batch)
    return cache
