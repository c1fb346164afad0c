"""Memory of keys and values: one pair of tensors a layer, cut into blocks, sized by a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltakeeper.engine.blocks import BLOCK
from deltakeeper.errors import EngineError


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps of a token: `2 · kv_heads · dim` numbers."""

    kv_heads: int
    dim: int

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one block, keys and values."""
        return 2 * self.kv_heads * self.dim * BLOCK * dtype.itemsize


class KVCache:
    """The tensors. On the CPU the system gives memory only to blocks that are used.

    Attributes:
        layers: keys and values of each layer, `(blocks, kv_heads, BLOCK, dim)` each, contiguous.
        blocks: number of blocks; one number stands for the same block in every layer.
        block_bytes: bytes of a block over all layers.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], nbytes: int, most_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve as many blocks as fit into `nbytes`, and no more than `most_blocks`.

        Raises:
            EngineError: not one block fits.
        """
        self.block_bytes = sum(shape.block_bytes(dtype) for shape in shapes)
        self.blocks = min(nbytes // self.block_bytes, most_blocks)
        if self.blocks < 1:
            raise EngineError(
                f"the KV cache may take {nbytes} bytes, but one block of {BLOCK} tokens takes {self.block_bytes}; "
                "raise kv_bytes."
            )

        def empty(shape: LayerShape) -> torch.Tensor:
            return torch.zeros(self.blocks, shape.kv_heads, BLOCK, shape.dim, dtype=dtype, device=device)

        self.layers = [(empty(shape), empty(shape)) for shape in shapes]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.blocks * self.block_bytes
