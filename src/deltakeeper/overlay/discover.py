"""Find the modules of a live decoder that the overlay can serve tenants at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltakeeper.overlay.current import CurrentPass
from deltakeeper.overlay.embeddings import EmbeddingSite
from deltakeeper.overlay.experts import ExpertsSite
from deltakeeper.overlay.head import HeadSite, OtherHeadSite
from deltakeeper.overlay.linears import LinearSite, OtherLinearSite
from deltakeeper.overlay.norms import norm_site
from deltakeeper.overlay.site import Site
from deltakeeper.overlay.sliced import SlicedSite

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def find_sites(model: nn.Module, current: CurrentPass) -> dict[str, Site]:
    """Sites by module path. Modules that are none keep to the base, and a delta that changes one is refused.

    Towers beside the decoder (vision, audio) see no tokens, so theirs are left out.
    """
    head = _asked(model, "get_output_embeddings")
    decoder = _asked(model, "get_decoder") or model
    inside = set(decoder.modules()) | ({head} if head is not None else set())
    found: dict[str, Site] = {}
    for name, module in model.named_modules():
        site = _site(name, module, module is head, current) if module in inside else None
        if site is not None:
            found[name] = site
    return found


def _site(name: str, module: nn.Module, is_head: bool, current: CurrentPass) -> Site | None:
    kind = type(module)
    if kind.forward is nn.Linear.forward and _is_plain(module._parameters["weight"]):
        return (HeadSite if is_head else LinearSite)(name, module, current)
    if SlicedSite.is_router(module):  # some are a kind of linear layer, which gives more than a product
        return SlicedSite(name, module, current)
    if kind.__name__ == "Conv1D" or _multiplies(module):
        return (OtherHeadSite if is_head else OtherLinearSite)(name, module, current)
    if isinstance(module, nn.Embedding):
        plain = kind.forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        fits = plain and module.max_norm is None and _is_plain(module._parameters["weight"])
        return EmbeddingSite(name, module, current) if fits else None
    if ExpertsSite.fits(module):
        return ExpertsSite(name, module, current)
    return None if module._modules else norm_site(name, module, current)


def _is_plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and weight.dtype in _PLAIN


def _multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer of some kind, such as a quantised one; adapters wrap others and are not."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and not module._modules


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    found = getattr(model, method, None)
    module = found() if callable(found) else None
    return module if isinstance(module, nn.Module) else None
