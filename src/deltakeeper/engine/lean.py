"""Decoder layers of the Llama shape in a dozen operators each: a token of one request is otherwise mostly Python.

A layer is taken over only if its parts are those of that shape and a trial shows that it gives what the layer gave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltakeeper.engine.attention import LayerAttention
from deltakeeper.engine.batch import Batch
from deltakeeper.kernels.layer import decoder_layer
from deltakeeper.kernels.pointwise import rotate, silu_mul
from deltakeeper.overlay import Overlay

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class LeanLayer:
    """One decoder layer; `open` puts it in the place of the layer's own `forward`, `close` takes it away."""

    def __init__(self, layer: Any, place: LayerAttention, overlay: Overlay) -> None:
        """Make the lean form of a layer that `fits`.

        Args:
            layer: the decoder layer.
            place: its attention, and its part of the cache.
            overlay: what the model's modules compute through.
        """
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self.layer, self.place = layer, place
        self.dim: int = attention.head_dim
        self.norm_before: Any = layer.input_layernorm.forward
        self.norm_between: Any = layer.post_attention_layernorm.forward
        self.queries_keys_values = overlay.joint([attention.q_proj, attention.k_proj, attention.v_proj])
        self.head_norms = [attention.q_norm, attention.k_norm] if "q_norm" in attention._modules else None
        self.gate_up = overlay.joint([mlp.gate_proj, mlp.up_proj])
        self.out: Any = attention.o_proj.forward
        self.down: Any = mlp.down_proj.forward
        self.current = overlay.pass_under_way
        self.all = overlay.joint(
            [
                *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
                *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            ]
        )
        self.norms = [overlay.norm(layer.input_layernorm), overlay.norm(layer.post_attention_layernorm)]
        first, second = self.norms
        self.whole = (
            self.head_norms is None and first is not None and second is not None and first.epsilon == second.epsilon
        )

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **settings: Any
    ) -> torch.Tensor:
        """The layer's pass, `(1, tokens, width)`."""
        place, dim = self.place, self.dim
        batch = place.running.batch
        if batch is None:  # somebody else calls the model: the attention function tells them
            own: torch.Tensor = type(self.layer).forward(
                self.layer, hidden_states, position_embeddings=position_embeddings, **settings
            )
            return own
        x: torch.Tensor = hidden_states[0]
        tokens = x.shape[0]
        cos, sin = position_embeddings
        terms = self.all.terms() if self.whole else None
        if terms is not None:
            return self._in_one(x, (cos[0], sin[0]), batch, terms)
        q, k, v = self.queries_keys_values(self.norm_before(x))
        q, k, v = q.view(tokens, -1, dim), k.view(tokens, -1, dim), v.view(tokens, -1, dim)
        if self.head_norms is not None:
            q, k = self.head_norms[0].forward(q), self.head_norms[1].forward(k)
        q, k = rotate(q, k, cos[0], sin[0])
        seen = place.attend(q, k, v, batch)
        x = x + self.out(seen.view(tokens, -1))
        gate, up = self.gate_up(self.norm_between(x))
        x = x + self.down(silu_mul(gate, up))
        result: torch.Tensor = x.unsqueeze(0)
        return result

    def _in_one(
        self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], batch: Batch, terms: torch.Tensor
    ) -> torch.Tensor:
        """The whole layer in one operator, `(1, tokens, width)`."""
        place, groups = self.place, self.current.groups
        norms, slots = zip(*(norm.rows(groups) for norm in self.norms if norm and groups), strict=True)
        assert groups is not None
        y = decoder_layer(
            x,
            self.all.weights,
            norms,
            slots,
            terms,
            groups,
            turns,
            (place.cache_k, place.cache_v),
            batch.places,
            batch.tables,
            batch.query_starts,
            batch.lengths,
            eps=self.norms[0].epsilon if self.norms[0] else 0.0,
            scale=place.scale,
            window=place.window,
            softcap=place.softcap,
            merge_from=self.current.merge_from,
        )
        return y.unsqueeze(0)

    def open(self) -> None:
        """Let the layer's calls run through this object."""
        self.layer.__dict__["forward"] = self.forward

    def close(self) -> None:
        """Give the layer its own `forward` back."""
        self.layer.__dict__.pop("forward", None)


def fits(layer: nn.Module) -> bool:
    """Whether a decoder layer has the parts of the Llama shape and nothing else, no hooks and no own `forward`."""
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if attention is None or mlp is None or set(layer._modules) != _LAYER or set(mlp._modules) != _MLP:
        return False
    parts = set(attention._modules)
    if parts not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or not isinstance(getattr(attention, "head_dim", None), int):
        return False
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks
        for name, module in layer.named_modules()
        if name  # hooks of the layer itself still run
    )
    own = any("forward" in module.__dict__ for module in (layer, attention, mlp))
    acts = mlp._modules["act_fn"]
    return not hooked and not own and type(acts).__name__ in ("SiLU", "SiLUActivation")
