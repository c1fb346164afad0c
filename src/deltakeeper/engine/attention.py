"""One layer's attention over the engine's paged cache, for whoever computes the layer."""

from __future__ import annotations

import torch

from deltakeeper.engine.batch import Batch
from deltakeeper.engine.probe import Heads
from deltakeeper.kernels.attention import paged_attention, write_cache_


class RunningPass:
    """Where the layers of one model find the batch of the running pass."""

    batch: Batch | None = None


class LayerAttention:
    """How one layer attends, and its part of the cache.

    Attributes:
        scale: of the scores, like `window` and `softcap`; see `paged_attention`.
        window: see `scale`.
        softcap: see `scale`.
        cache_k: keys, `(blocks, kv_heads, BLOCK, dim)`; `cache_v` alike.
        cache_v: see `cache_k`.
        running: the pass under way.
    """

    def __init__(self, heads: Heads, cache: tuple[torch.Tensor, torch.Tensor], running: RunningPass) -> None:
        self.scale, self.window, self.softcap = heads.scale, heads.window, heads.softcap
        self.cache_k, self.cache_v = cache
        self.running = running

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Write the keys and values of a batch and attend to them: `(tokens, heads, dim)` each."""
        write_cache_(self.cache_k, self.cache_v, k, v, batch.places)
        return paged_attention(
            q,
            self.cache_k,
            self.cache_v,
            batch.tables,
            batch.query_starts,
            batch.lengths,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )
