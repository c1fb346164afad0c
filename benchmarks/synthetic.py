"""Checkpoints of any size for timing: real shapes, Gaussian weights and deltas. They say nothing of quality."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from deltakeeper.model_writer import ModelWriter, Planned

WEIGHT_STD, DELTA_STD = 0.02, 5e-4
_POOL = 1 << 24

SHAPES = {
    # name: (vocabulary, hidden, intermediate, layers, key-value width, head is tied, attention has biases)
    "llama-3.1-8b": (128256, 4096, 14336, 32, 1024, False, False),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 512, False, True),
}
"""The configurations that the makers published (meta-llama/Llama-3.1-8B, Qwen/Qwen2.5-7B)."""


def decoder(
    vocabulary: int, hidden: int, intermediate: int, layers: int, narrow: int, tied: bool = False, biases: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-like decoder."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            if biases:
                found[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        found[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{at}mlp.gate_proj.weight"] = (intermediate, hidden)
        found[f"{at}mlp.up_proj.weight"] = (intermediate, hidden)
        found[f"{at}mlp.down_proj.weight"] = (hidden, intermediate)
        found[f"{at}input_layernorm.weight"] = (hidden,)
        found[f"{at}post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not tied:
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def decoder_of(parameters: float) -> dict[str, tuple[int, ...]]:
    """A decoder of about so many parameters, in the proportions of Llama with a vocabulary of 32,000."""
    hidden = 128 * round((parameters / 1.6e3) ** (1 / 3) / 12.5) if parameters < 1e9 else 4096
    hidden = max(512, min(4096, hidden))
    intermediate = 256 * round(hidden * 2.7 / 256)
    block = 4 * hidden * hidden + 3 * hidden * intermediate
    layers = max(1, round((parameters - 2 * 32000 * hidden) / block))
    return decoder(32000, hidden, intermediate, layers, hidden)


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in shapes.values())


def write_pair(folder: Path, shapes: dict[str, tuple[int, ...]], shard_bytes: int = 5 * 10**9) -> None:
    """Write `base` and `tuned`, bfloat16; entries repeat after 16 million, which no codec here can see."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_POOL, generator=generator) * WEIGHT_STD
    pools = {
        "base": weights.bfloat16(),
        "tuned": (weights.bfloat16().float() + torch.randn(_POOL, generator=generator) * DELTA_STD).bfloat16(),
    }
    for side, pool in pools.items():
        target = folder / side
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps({"model_type": "llama"}))
        data = memoryview(pool.view(torch.uint8).numpy())
        planned = {name: Planned("BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()}
        with ModelWriter(target, planned, shard_bytes) as writer:
            for i, (name, item) in enumerate(planned.items()):
                for at, piece in _pieces(data, item.nbytes, 2 * 7919 * i):
                    writer.write(name, at, piece)


def _pieces(data: memoryview, nbytes: int, start: int) -> Iterator[tuple[int, memoryview]]:
    done = 0
    at = start % len(data)
    while done < nbytes:
        piece = data[at : at + min(len(data) - at, nbytes - done)]
        yield done, piece
        done, at = done + len(piece), 0
