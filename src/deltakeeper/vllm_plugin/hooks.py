"""Every place in vLLM that the plugin takes a hand in; none of it is an interface that vLLM promises to keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltakeeper.artifact import MANIFEST_NAME
from deltakeeper.vllm_plugin import cache_keys
from deltakeeper.vllm_plugin.slots import DeltaSlots

_MARK = "__deltakeeper__"


def install() -> None:
    """Put all hooks in their places; those that are there already stay."""
    _hook_slots()
    _hook_loading()
    _hook_layers()
    _hook_prompt_ratings()
    _hook_cache_keys()


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let `around(inner, ...)` answer for a function or method, once."""
    inner = getattr(owner, name)
    if hasattr(inner, _MARK):
        return

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def _hook_slots() -> None:
    """Slots are filled and emptied where vLLM fills and empties its own."""
    from vllm.lora import model_manager
    from vllm.lora.model_manager import LoRAModelManager

    def widen(inner: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        # On CPUs vLLM reads the LoRA of the base's rows, slot -1, from the last slot: make one more, which stays zero.
        at = 1 if inner.__name__ == "from_layer_logits_processor" else 0
        return inner(layer, *args[:at], args[at] + 1, *args[at + 1 :], **kwargs)

    def create(inner: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[-1]
        self.deltakeeper = DeltaSlots(self, config)

    def activate(inner: Any, self: Any, lora_id: int) -> bool:
        done: bool = inner(self, lora_id)
        if done:
            adapter = self._registered_adapters[lora_id]
            self.deltakeeper.put(self.lora_index_to_id.index(lora_id), getattr(adapter, "deltakeeper", None))
        return done

    def deactivate(inner: Any, self: Any, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.deltakeeper.clear(self.lora_index_to_id.index(lora_id))
        inner(self, lora_id)

    def remove_all(inner: Any, self: Any) -> None:
        self.deltakeeper.clear_all()
        inner(self)

    def map_rows(inner: Any, self: Any, mapping: Any) -> None:
        inner(self, mapping)
        (punica,) = set(self.punica_wrapper_mapping.values())
        self.deltakeeper.rows.begin(punica.token_lora_indices, punica.sampler_indices)

    _wrap(model_manager, "from_layer", widen)
    _wrap(model_manager, "from_layer_logits_processor", widen)
    _wrap(LoRAModelManager, "__init__", create)
    _wrap(LoRAModelManager, "activate_adapter", activate)
    _wrap(LoRAModelManager, "_deactivate_adapter", deactivate)
    _wrap(LoRAModelManager, "remove_all_adapters", remove_all)
    _wrap(LoRAModelManager, "_set_adapter_mapping", map_rows)


def _hook_loading() -> None:
    """An adapter's path that holds an artifact becomes an adapter without any LoRA, and with the delta beside it."""
    import msgspec
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    def load(inner: Any, self: Any, request: Any) -> Any:
        path = Path(request.lora_path).expanduser()
        if not (path / MANIFEST_NAME).is_file():
            return inner(self, request)
        adapter = LoRAModel(request.lora_int_id, rank=1, loras={})
        adapter.deltakeeper = self._adapter_manager.deltakeeper.load(path)
        return adapter

    def pack(inner: Any, self: Any, adapter: Any) -> None:
        if not hasattr(adapter, "deltakeeper"):  # vLLM looks at the first LoRA of any adapter, and ours have none
            inner(self, adapter)

    def use(inner: Any, self: Any, requests: Any) -> None:
        # A name that was loaded in place keeps that mark, and vLLM would read it from disk again for every pass.
        known = self._adapter_manager.list_adapters()
        ours = {number for number, adapter in known.items() if hasattr(adapter, "deltakeeper")}
        inner(self, {msgspec.structs.replace(r, load_inplace=False) if r.lora_int_id in ours else r for r in requests})

    _wrap(WorkerLoRAManager, "_load_adapter", load)
    _wrap(LoRAModelManager, "_create_merged_loras_inplace", pack)
    _wrap(LRUCacheWorkerLoRAManager, "_apply_adapters", use)


def _hook_layers() -> None:
    """Modules that have a site hand it their results, behind what vLLM and its LoRAs compute."""
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    def linear(inner: Any, self: Any, x: Any, output: Any) -> Any:
        y = inner(self, x, output)
        if (site := getattr(self, "deltakeeper", None)) is not None:
            site.apply_(y, x)
        return y

    def first(inner: Any, self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = inner(self, x, *args, **kwargs)
        if (site := getattr(self, "deltakeeper", None)) is not None and y is not None:
            site.apply_(y, x)
        return y

    def norm(inner: Any, self: Any, x: Any, residual: Any = None) -> Any:
        found = inner(self, x, residual)
        if (site := getattr(self, "deltakeeper", None)) is not None:
            # With a residual, the sum of both is the second of what a norm gives.
            site.apply_(*((found, x) if residual is None else found))
        return found

    def head(inner: Any, self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        site = getattr(self, "deltakeeper", None)
        if site is None or not site.rows.rating:
            return first(inner, self, hidden, *args, **kwargs)
        with _sampling(self.punica_wrapper, site.rows.of_logits(hidden).groups.row_slots - 1):
            return first(inner, self, hidden, *args, **kwargs)

    _wrap(BaseLinearLayerWithLoRA, "_apply_lora_to_output", linear)
    for embedding in (VocabParallelEmbedding, VocabParallelEmbeddingWithLoRA):
        _wrap(embedding, "forward", first)
    _wrap(LogitsProcessor, "_get_logits", first)
    _wrap(LogitsProcessorWithLoRA, "_get_logits", head)
    _wrap(RMSNorm, "forward_native", norm)


@contextmanager
def _sampling(punica: Any, slots: Any) -> Iterator[None]:
    """Tell vLLM's own LoRA of the head which slots the rows have, int64 `(rows,)`.

    While it rates a prompt it takes the rows for those it samples from, and its engine ends where their numbers differ.
    """
    kept, count = punica._sampler_indices.clone(), punica.indices_len[1]
    punica._sampler_indices[: len(slots)] = slots
    punica.indices_len[1] = len(slots)
    try:
        yield
    finally:
        punica._sampler_indices.copy_(kept)
        punica.indices_len[1] = count


def _hook_prompt_ratings() -> None:
    """While vLLM rates prompts it asks for logits of other rows than those it samples from."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def rate(inner: Any, self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(getattr(self, "lora_manager", None), "_adapter_manager", None)
        if manager is None:
            return inner(self, hidden, *args, **kwargs)
        with manager.deltakeeper.rows.rating_prompts(hidden):
            return inner(self, hidden, *args, **kwargs)

    _wrap(GPUModelRunner, "_get_prompt_logprobs_dict", rate)


def _hook_cache_keys() -> None:
    """Blocks of a prefix are found by keys that know the load; see `cache_keys`."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    def come(inner: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        cache_keys.load_of(self)

    def keys(inner: Any, request: Any) -> Any:
        return inner(request) + cache_keys.load_of(request)

    def add(inner: Any, self: Any, request: Any) -> Any:
        cache_keys.note_load(request)
        return inner(self, request)

    _wrap(Request, "__init__", come)
    _wrap(kv_cache_utils, "_gen_lora_extra_hash_keys", keys)
    _wrap(EngineCore, "add_lora", add)
