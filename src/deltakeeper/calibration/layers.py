"""Linear layers of a model, grouped by what they are fed, and cut into chunks that fit a memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

_BLOCK = re.compile(r"(.*?\.\d+)(?:\.|$)")


@dataclass(eq=False)
class LayerGroup:
    """Layers that are fed the very same tensor, such as query, key and value.

    Attributes:
        modules: the layers.
        names: checkpoint names of their weights; more than one a layer where weights are tied.
        size: width of the tensor.
        once: whether each is run once in a pass.
    """

    modules: list[nn.Module]
    names: list[str]
    size: int
    once: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the sum of products, float32."""
        return 4 * self.size * self.size

    @property
    def block(self) -> str:
        """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; the name itself outside of numbered blocks."""
        found = _BLOCK.match(self.names[0])
        return found[1] if found else self.names[0]


def group_layers(
    model: nn.Module, linears: Sequence[nn.Module], calls: Sequence[tuple[nn.Module, torch.Tensor]]
) -> list[LayerGroup]:
    """Groups in the order of their calls, then the layers that were not called once alone.

    Args:
        model: gives the names.
        linears: all layers of interest.
        calls: layers in the order in which they were run, with the tensor (the very object) that each was fed.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    times = Counter(module for module, _ in calls)
    fed: dict[int, list[nn.Module]] = {}
    for module, x in calls:
        if times[module] == 1:
            fed.setdefault(id(x), []).append(module)
    found = [(modules, True) for modules in fed.values()]
    found += [([module], False) for module in linears if times[module] != 1]
    return [
        LayerGroup(modules, [n for m in modules for n in owners[_weight(m)]], _width(modules[0]), once)
        for modules, once in found
    ]


def chunk_groups(groups: Sequence[LayerGroup], memory: int) -> list[list[LayerGroup]]:
    """Neighbouring groups whose sums fit the memory, cut between numbered blocks where one block fits."""
    blocks: dict[str, list[LayerGroup]] = {}
    for group in groups:
        blocks.setdefault(group.block, []).append(group)
    units: list[list[LayerGroup]] = []
    for block in blocks.values():
        units += [block] if sum(g.nbytes for g in block) <= memory else [[g] for g in block]
    chunks: list[list[LayerGroup]] = []
    for unit in units:
        if chunks and sum(g.nbytes for g in chunks[-1] + unit) <= memory:
            chunks[-1] += unit
        else:
            chunks.append(list(unit))
    return chunks


def _width(module: nn.Module) -> int:
    return int(_weight(module).shape[1 if isinstance(module, nn.Linear) else 0])


def _weight(module: nn.Module) -> nn.Parameter:
    return cast("nn.Parameter", module.weight)
