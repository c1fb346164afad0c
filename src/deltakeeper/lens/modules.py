"""Which tensors belong to which layer, and within it to attention or MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from deltakeeper.lens.blocks import find_blocks, held
from deltakeeper.lens.parts import BlockParts, find_parts
from deltakeeper.lens.reading import run
from deltakeeper.lens.restored import Place

Tensors = dict[Place, tuple[str, ...]]
"""Names of parameters by place, aliases of tied ones included."""
PROBE = torch.arange(3, 11)[None]
"""A few tokens that any vocabulary has."""


def layer_tensors(model: nn.Module) -> Tensors:
    """Tensors of each layer, and last of what is in none: embeddings, the last norm, the head.

    Raises:
        LensError: the model's blocks are not found.
    """
    blocks = find_blocks(model)
    owners = {parameter: layer for layer, block in enumerate(blocks) for parameter in block.parameters()}
    found: dict[Place, list[str]] = {Place("layer", (layer,)): [] for layer in range(len(blocks))}
    outside = found.setdefault(Place("outside", ()), [])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = owners.get(parameter)
        (outside if layer is None else found[Place("layer", (layer,))]).append(name)
    return {place: tuple(names) for place, names in found.items()}


@torch.no_grad()
def part_tensors(model: nn.Module, tokens: torch.Tensor = PROBE) -> Tensors:
    """Tensors of attention (the mixer of tokens of any kind) and of the MLP in each layer, and of what is in none.

    What a block starts to run until its attention has given what joins the stream belongs to attention, and the rest to
    the MLP; so a norm belongs to what it feeds, and where attention and MLP share one, to attention.

    Args:
        model: a decoder in evaluation mode.
        tokens: a few that its vocabulary has, int64 `(1, length)`, for the pass that tells the parts apart.

    Raises:
        LensError: the parts of a block are not found.
    """
    blocks, tokens = find_blocks(model), tokens.to(next(model.parameters()).device)
    with held(model):
        parts = find_parts(blocks, lambda: run(model, tokens))
        owners: dict[nn.Parameter, Place] = {}
        for layer, mlp in enumerate(_late_modules(blocks, parts, lambda: run(model, tokens))):
            for name, parameter in blocks[layer].named_parameters():
                path = name.rpartition(".")[0]
                # What is never called itself, as weights of experts are, belongs to what holds it.
                while path and path not in mlp:
                    path = path.rpartition(".")[0]
                late = mlp.get(path, parts[layer].attention is None)
                owners[parameter] = Place("mlp" if late else "attention", (layer,))
    found: dict[Place, list[str]] = {}
    outside: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = owners.get(parameter)
        (outside if place is None else found.setdefault(place, [])).append(name)
    ordered = sorted(found, key=lambda place: (place.layers, place.patched))
    return {**{place: tuple(found[place]) for place in ordered}, Place("outside", ()): tuple(outside)}


def _late_modules(
    blocks: Sequence[nn.Module], parts: Sequence[BlockParts], run: Callable[[], Any]
) -> list[dict[str, bool]]:
    """By layer, for each module inside by its path: whether it starts after attention has given its share."""
    found: list[dict[str, bool]] = [{} for _ in blocks]
    done = [one.attention is None for one in parts]
    handles = []
    try:
        for layer, block in enumerate(blocks):
            for path, module in block.named_modules():
                if path:
                    handles.append(module.register_forward_pre_hook(_starter(found[layer], path, done, layer)))
            share = parts[layer].attention
            if share is not None and parts[layer].mlp is not None:
                handles.append(share.module.register_forward_hook(_finisher(done, layer)))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _starter(found: dict[str, bool], path: str, done: list[bool], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        found.setdefault(path, done[layer])

    return hook


def _finisher(done: list[bool], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        done[layer] = True

    return hook
