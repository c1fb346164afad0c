"""Small traces out of random distributions, for tests of what is made of traces."""

from __future__ import annotations

import torch

from deltakeeper.lens.trace import TraceMeta
from deltakeeper.lens.trace_builder import TraceBuilder

LAYERS, PLACES, VOCAB, WIDTH = 4, 2, 23, 6
NAMES = ("base", "tuned", "half")


def random_log_probs(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).log_softmax(-1)


def metas(prompt="p"):
    return {name: TraceMeta(variant=name, base="tiny", prompt=prompt) for name in NAMES}


def all_log_probs(seed=0, near=0.3):
    """Logits of base and fine-tune; "half" lies halfway between them."""
    generator = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(LAYERS, PLACES, VOCAB, generator=generator)
    tuned = base + near * torch.randn(LAYERS, PLACES, VOCAB, generator=generator)
    return {"base": base.log_softmax(-1), "tuned": tuned.log_softmax(-1), "half": ((base + tuned) / 2).log_softmax(-1)}


def all_streams(seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(LAYERS, PLACES, WIDTH, generator=generator)
    tuned = base + torch.randn(LAYERS, PLACES, WIDTH, generator=generator)
    return {"base": base, "tuned": tuned, "half": (base + tuned) / 2}


def new_builder(log_probs, prompt="p", **settings):
    settings = {
        "references": ("base", "tuned"),
        "targets": {"refusal": (3, 7)},
        "produced": dict.fromkeys(NAMES, (5, 6)),
        "spell": lambda token: f"w{token}",
        "top": 3,
    } | settings
    final = {name: values[-1] for name, values in log_probs.items()}
    return TraceBuilder(metas(prompt), range(LAYERS), (1, 4), ["a", "b", "c", "</d>", "é"], final, **settings)


def make_traces(seed=0, prompt="p", **settings):
    log_probs = all_log_probs(seed)
    builder = new_builder(log_probs, prompt, **settings)
    builder.add(range(LAYERS), log_probs)
    builder.add_streams(range(LAYERS), all_streams(seed), base="base", tuned="tuned")
    return builder.build()
