"""One pass of one token through a model, to learn how its layers attend before the engine takes that over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltakeeper.errors import EngineError

PROBE = "deltakeeper_probe"
# What layers may tell the attention function without changing its result, and what the engine honours.
_HARMLESS = {"dropout", "position_ids", "use_cache", "is_causal", "cache_position", "position_embeddings"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "cu_seq_lens_q"}
_HARMLESS |= {"cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch"}
_HONOURED = {"scaling", "sliding_window", "softcap"}


@dataclass(frozen=True, eq=False)
class Heads:
    """How one layer attends.

    Attributes:
        module: the attention module that called.
        kv_heads: heads of keys and values.
        dim: width of a head.
        scale: factor of the products.
        window: tokens that a token looks back, itself included; 0 for all.
        softcap: bound of the products; 0 for none.
        dtype: of its keys and values.
    """

    module: nn.Module
    kv_heads: int
    dim: int
    scale: float
    window: int
    softcap: float
    dtype: torch.dtype


class _Mask:
    """Stands where a mask tensor would, and keeps the function that would have filled it."""

    def __init__(self, allows: Callable[..., Any]) -> None:
        self.allows = allows


class _NotServedError(Exception):
    """Why a model is not served; the message fits behind its name."""


_calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, Any, dict[str, Any]]] = []


def probe_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Attention of a single token, which is its value, noted down (transformers' attention interface)."""
    _calls.append((module, query, key, value, mask, settings))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


def probe_mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> Any:
    """A stand-in for a mask that keeps its rule (transformers' mask interface)."""
    return _Mask(mask_function)


def learn_heads(model: Any, context: int) -> list[Heads]:
    """How each layer attends; the model's config must name `PROBE` as its attention.

    Args:
        model: a transformers decoder.
        context: longest context that will be served; masks are checked up to it.

    Raises:
        EngineError: the model keeps state that is not keys and values of causal attention.
    """
    name = type(model).__name__
    _calls.clear()
    try:
        device = model.get_input_embeddings().weight.device
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False, logits_to_keep=1)
        calls = list(_calls)
        layers = getattr(model.config, "num_hidden_layers", len(calls))
        if len(calls) != layers or len({id(call[0]) for call in calls}) != layers:
            raise _NotServedError(
                f"{len(calls)} of its {layers} layers attend through transformers' attention interface"
            )
        windows: dict[int, int] = {}
        return [_heads(call, context, windows) for call in calls]
    except _NotServedError as refusal:
        raise EngineError(f"{name} is not served: {refusal}; serve it with transformers itself.") from None
    except Exception as error:  # whatever a model raises that is no decoder
        raise EngineError(f"{name} is not served: it cannot compute one token ({error}); give a decoder.") from error
    finally:
        _calls.clear()


def _heads(call: tuple[Any, ...], context: int, windows: dict[int, int]) -> Heads:
    module, query, key, value, mask, settings = call
    unknown = {k for k, v in settings.items() if v is not None and v is not False} - _HARMLESS - _HONOURED
    if unknown:
        raise _NotServedError(f"its attention uses {', '.join(sorted(unknown))}, which the engine does not know")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise _NotServedError(f"its keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
    if not isinstance(mask, _Mask):
        raise _NotServedError("it builds its attention mask in a way of its own")
    if id(mask) not in windows:
        windows[id(mask)] = _window(mask, context, query.device)
    window = windows[id(mask)]
    told = settings.get("sliding_window")
    if window and told is not None and told != window:
        raise _NotServedError(f"its mask looks {window} tokens back but its layer says {told}")
    scale = settings.get("scaling")
    return Heads(
        module=module,
        kv_heads=key.shape[1],
        dim=key.shape[-1],
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        softcap=float(settings.get("softcap") or 0.0),
        dtype=key.dtype,
    )


def _window(mask: _Mask, context: int, device: torch.device) -> int:
    """How far a mask looks back, 0 for all the way, read off its rule at a few places."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    at = torch.arange(context, device=device)
    window = 0
    for token in sorted({context - 1, context * 2 // 3, context // 2, context // 5, 0}, reverse=True):
        allowed = mask.allows(zero, zero, torch.full_like(zero, token), at).expand(context)
        seen = int(allowed.sum())
        if token == context - 1 and seen < context:
            window = seen
        expected = (at <= token) & (at > token - (window or context))
        if not torch.equal(allowed, expected):
            raise _NotServedError("its layers attend neither to all earlier tokens nor to a sliding window of them")
    return window
