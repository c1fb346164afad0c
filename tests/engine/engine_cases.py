"""Prompts, reference answers and short ways to run an engine, for its tests."""

from __future__ import annotations

import torch

from deltakeeper.engine import Engine, EngineSettings, Request


def prompts_of(*lengths, seed=1, low=3, high=96):
    """Random prompts of some lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(low, high, (n,), generator=generator).tolist()) for n in lengths]


def reference(model, prompt, new_tokens):
    """The greedy answer of transformers' own `generate`."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def settings_of(**settings):
    """Engine settings with a small cache."""
    return EngineSettings(**{"kv_bytes": 1 << 20} | settings)


def decode(model, prompts, new_tokens, **settings):
    """Greedy answers of an engine over the base, all prompts at once."""
    with Engine(model, None, settings=settings_of(**settings)) as engine:
        answers = engine.generate([Request(prompt, max_new_tokens=new_tokens) for prompt in prompts])
        assert engine.stats().kv_blocks_used == 0
    return [list(answer.tokens) for answer in answers]
