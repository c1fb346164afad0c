"""Tiny models in which some layers carry a planted effect."""

from __future__ import annotations

import copy

import torch
from lens_families import build_family, sample_ids

from deltakeeper.lens import find_blocks, weights_of
from deltakeeper.lens.outcomes import token_margin

LAYERS, PLANTED = 4, 2
MARGIN = token_margin([5, 6], [7, 8])
BOTH = {"donor": "base", "receiver": "tuned", "outcome": MARGIN}


def build(kind="llama"):
    count = {"num_hidden_layers": LAYERS, "attention_types": [[["global", "local"], 2]]}
    return build_family(kind, **{k: v for k, v in count.items() if k != "attention_types" or kind == "gpt_neo"})


def disturb(model, layers, seed=1, part=""):
    """A copy whose blocks of some layers have other weights."""
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for name, parameter in find_blocks(found)[layer].named_parameters():
                if part in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def texts(rows=4):
    ids, mask = sample_ids(rows), torch.ones(rows, 7, dtype=torch.int64)
    mask[0, :3] = 0  # padded on the left
    return ids, mask


def change_lists(base, *others):
    return {"base": [], **{name: weights_of(model) for name, model in others}}
