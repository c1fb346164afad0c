"""vLLM's LoRA slots on one model, and the deltas in them."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltakeeper.artifact import SIDE_FILES
from deltakeeper.overlay.settings import CONFIG
from deltakeeper.vllm_plugin.base_model import base_root, refuse_unsupported
from deltakeeper.vllm_plugin.loading import HeldDelta, load_delta
from deltakeeper.vllm_plugin.places import Places
from deltakeeper.vllm_plugin.rows import CurrentRows
from deltakeeper.vllm_plugin.sites import EmbeddingSite, HeadSite, LinearSite, NormSite, Site

WRAPPED = ".base_layer"
"""How the path ends of a module that another one stands in for."""


class DeltaSlots:
    """Everything that the plugin adds to a model of vLLM that is ready for LoRA.

    A slot is a number in tables: what a delta holds is held once, however many slots there are, and an empty slot, or
    one of an ordinary LoRA, holds nothing here.

    Attributes:
        rows: which rows of the current pass belong to which slot.
        sites: the modules that know slots.

    Raises:
        DataError: vLLM was started in a way that the plugin does not know.
    """

    def __init__(self, manager: Any, config: Any) -> None:
        refuse_unsupported(config, torch.device(manager.device).type)
        self._config = config
        self.rows = CurrentRows()
        count = manager.lora_slots + 1
        self.sites = _sites(manager, self.rows, count)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        self._places = Places(
            self.sites,
            manager.packed_modules_mapping,
            None if mapper is None else mapper.get_rename_mapper()._map_name,
            bool(getattr(config.model_config.hf_config, "tie_word_embeddings", False)),
        )
        self._taken: dict[int, HeldDelta] = {}

    @cached_property
    def base_root(self) -> str:
        """Fingerprint of the base, read when the first artifact comes."""
        return base_root(self._config.model_config.model, str(self._config.load_config.load_format))

    def load(self, path: Path) -> HeldDelta:
        """Read an artifact; see `load_delta` for what is refused."""
        from vllm.logger import init_logger

        logger = init_logger("vllm.deltakeeper")
        start = time.perf_counter()
        model = self._config.model_config
        held = load_delta(path, self.base_root, model.hf_config, self._places, model.dtype)
        logger.info(
            "deltakeeper: %s read in %.0f ms; it holds %d bytes, in %d packed terms and %d values",
            path,
            (time.perf_counter() - start) * 1e3,
            held.nbytes,
            len(held.terms),
            len(held.values),
        )
        unused = [name for name in SIDE_FILES if name != CONFIG and (path / name).is_file()]
        if unused:
            logger.warning("deltakeeper: %s has its own %s; vLLM uses the base's.", path, ", ".join(unused))
        return held

    def put(self, index: int, held: HeldDelta | None) -> None:
        """Put a delta into vLLM's slot of this index, or leave that to ordinary LoRA."""
        self.clear(index)
        if held is not None:
            held.put(index + 1)
            self._taken[index] = held

    def clear(self, index: int) -> None:
        """Let the slot be the base."""
        if self._taken.pop(index, None) is not None:
            for site in self.sites.values():
                site.clear(index + 1)

    def clear_all(self) -> None:
        """Let every slot be the base."""
        for index in list(self._taken):
            self.clear(index)


def _sites(manager: Any, rows: CurrentRows, slots: int) -> dict[str, Site]:
    """The modules of a model that know slots from now on, by path; vLLM's have theirs as `deltakeeper`."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    sites: dict[str, Site] = {}
    modules = {name: _wrapped(module) for name, module in manager.model.named_modules() if not name.endswith(WRAPPED)}
    heads = [(name, inner) for name, (_, inner) in modules.items() if isinstance(inner, ParallelLMHead)]
    for name, (module, inner) in modules.items():
        if isinstance(module, BaseLinearLayerWithLoRA):
            parts = module.output_slices if module.n_slices > 1 else (inner.output_size,)
            sites[name] = LinearSite(name, parts, inner.input_size, slots, rows, getattr(inner, "bias", None))
        elif isinstance(inner, VocabParallelEmbedding) and not isinstance(inner, ParallelLMHead):
            sites[name] = EmbeddingSite(name, (inner.org_vocab_size,), inner.embedding_dim, slots, rows)
        elif isinstance(inner, LogitsProcessor) and len(heads) == 1:
            head, matrix = heads[0]
            sites[head] = HeadSite(head, (inner.org_vocab_size,), matrix.embedding_dim, slots, rows)
            module.deltakeeper = sites[head]
        elif type(module) is RMSNorm and module.has_weight and module.variance_size_override is None:
            sites[name] = NormSite(name, module, slots, rows)
        if name in sites:
            module.deltakeeper = sites[name]
    return sites


def _wrapped(module: Any) -> tuple[Any, Any]:
    """A module, and the one that it has wrapped for LoRA, or itself."""
    from vllm.lora.layers import BaseLayerWithLoRA

    return module, module.base_layer if isinstance(module, BaseLayerWithLoRA) else module
