"""The model's pass over a batch: its attention replaced by ours for as long as the engine lives."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from deltakeeper.engine.attention import LayerAttention, RunningPass
from deltakeeper.engine.batch import Batch, trial_batch
from deltakeeper.engine.blocks import BLOCK
from deltakeeper.engine.kv_cache import KVCache, LayerShape
from deltakeeper.engine.lean import LeanLayer, fits
from deltakeeper.engine.probe import PROBE, Heads, learn_heads, probe_attention, probe_mask
from deltakeeper.engine.settings import EngineSettings
from deltakeeper.errors import DeltakeeperError, EngineError
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.overlay import attach

ATTENTION = "deltakeeper"


_layers: WeakKeyDictionary[nn.Module, LayerAttention] = WeakKeyDictionary()


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention over the paged cache (transformers' attention interface); query `(1, heads, tokens, dim)`."""
    layer = _layers.get(module)
    batch = None if layer is None else layer.running.batch
    if layer is None or batch is None:
        raise EngineError("the model is held by an engine; close the engine before calling the model yourself.")
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    out = layer.attend(q, k, v, batch)
    return out.unsqueeze(0), None  # (1, tokens, heads, dim)


class ForwardPass:
    """A live model that computes batches over a paged cache.

    Attributes:
        context: most tokens of one request.
        cache: the KV cache.
        device: where the model is.
    """

    def __init__(self, model: Any, overlay: Any, settings: EngineSettings) -> None:
        """Take the model's attention over; `close` gives it back.

        Args:
            model: a transformers decoder in evaluation mode.
            overlay: the overlay on it, or None.
            settings: sizes.

        Raises:
            EngineError: the model cannot be served, is held by another engine, or the cache holds no block.
        """
        _register()
        self._model, self._overlay = model, overlay
        self._configs = _configs(model)
        if any(own in (ATTENTION, PROBE) for _, own in self._configs):
            raise EngineError(f"{type(model).__name__} is held by another engine; close that one first.")
        if model.training:
            raise EngineError(f"{type(model).__name__} is in training mode; call its eval() first.")
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.context = _context(model.config, settings.max_context)
        self._running = RunningPass()
        self._heads: list[Heads] = []
        self._lean: list[LeanLayer] = []
        self._own_overlay = overlay is None
        if overlay is None:  # the base alone takes the same products, for their speed and so that bits do not change
            self._overlay = attach(model)
        try:
            self._set(PROBE)
            self._heads = learn_heads(model, self.context)
            shapes = [LayerShape(heads.kv_heads, heads.dim) for heads in self._heads]
            most = -(-self.context // BLOCK) * settings.max_running
            self.cache = KVCache(shapes, settings.kv_bytes, most, self._heads[0].dtype, self.device)
            for heads, cache in zip(self._heads, self.cache.layers, strict=True):
                _layers[heads.module] = LayerAttention(heads, cache, self._running)
            self._set(ATTENTION)
            self._take_layers()
        except BaseException:
            self.close()
            raise

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Compute a batch, in inference mode; logits `(answered rows, vocabulary)`, in the model's dtype."""
        with self._rows(batch):
            self._running.batch = batch
            try:
                logits: torch.Tensor = self._model(
                    input_ids=batch.tokens,
                    position_ids=batch.positions,
                    use_cache=False,
                    logits_to_keep=batch.answered,
                ).logits
            finally:
                self._running.batch = None
        return logits[0]

    def close(self) -> None:
        """Give the model its own attention back; the cache's memory goes with the last reference to this object."""
        for layer in self._lean:
            layer.close()
        for heads in self._heads:
            _layers.pop(heads.module, None)
        for config, own in self._configs:
            config._attn_implementation_internal = own
        if self._own_overlay:
            self._overlay.detach()
            self._own_overlay = False

    def _take_layers(self) -> None:
        """Compute layers of the Llama shape in fewer operators, if a trial shows that the logits stay the same."""
        layers = [module for module in self._model.modules() if "self_attn" in module._modules]
        own = [_layers.get(layer._modules["self_attn"]) for layer in layers]
        if self.device.type != "cpu" or len(layers) != len(self._heads) or None in own or not all(map(fits, layers)):
            return
        self._lean = [LeanLayer(layer, place, self._overlay) for layer, place in zip(layers, own, strict=True) if place]
        batch = trial_batch(self.context, self._model.get_input_embeddings().weight.shape[0])
        try:
            with torch.inference_mode():
                before = self(batch).float()
                for layer in self._lean:
                    layer.open()
                after = self(batch).float()
            allowed = 1e-3 if self._heads[0].dtype == torch.float32 else 0.02
            same = bool((after - before).abs().max() <= allowed * before.abs().max())
        except (DeltakeeperError, RuntimeError, TypeError):
            same = False
        if not same:
            for layer in self._lean:
                layer.close()
            self._lean = []

    def _rows(self, batch: Batch) -> AbstractContextManager[Any]:
        groups = RowGroups.of_runs(batch.slots, batch.counts)
        head = RowGroups.of_runs(batch.slots, batch.answers)
        rows: AbstractContextManager[Any] = self._overlay.rows(groups, head=head)
        return rows

    def _set(self, implementation: str) -> None:
        for config, _ in self._configs:
            config._attn_implementation_internal = implementation


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Without a mask function of its own, transformers builds no mask at all for an attention implementation.
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    ALL_ATTENTION_FUNCTIONS.register(PROBE, probe_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, probe_mask)


def _configs(model: Any) -> list[tuple[Any, str | None]]:
    """Every config that a layer asks for its attention, each once, with what it says now."""
    found = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return [(config, config._attn_implementation_internal) for config in found.values()]


def _context(config: Any, most: int | None) -> int:
    """Longest context: what the model was made for, before its rotary angles would depend on the batch."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int):
        context = most or 4096
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original:
            # Past this length transformers turns every row of a pass by other angles, those of short requests too.
            context = min(context, int(original))
    return context if most is None else min(context, most)
