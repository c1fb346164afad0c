"""What attention and MLP add to the residual stream: found by arithmetic, not by the names of modules.

A block computes `out = c·in + a·x + b·y`, where `x` and `y` are what two modules inside of it return (norms behind them
and residual multipliers included). A trial pass over a few tokens tells which two, and the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from deltakeeper.errors import LensError
from deltakeeper.lens.blocks import stream_of, watching

UNEXPLAINED = 1e-4
"""Share of what a block adds that the two may leave over, beside what the rounding of the stream explains."""
_MLP_WORDS = ("mlp", "ffn", "feedforward", "feed_forward", "moe", "expert")


@dataclass(frozen=True)
class Share:
    """A module inside a block, and by what its output is multiplied before it joins the stream."""

    module: nn.Module
    factor: float


@dataclass(frozen=True)
class BlockParts:
    """What a block adds: `attention` is the mixer of tokens of any kind; None where a block has no such part."""

    attention: Share | None
    mlp: Share | None


def find_parts(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[BlockParts]:
    """The parts of each block.

    Args:
        blocks: of the decoder.
        run: a pass of the model over a few tokens.

    Raises:
        LensError: no two modules of a block explain what it adds.
    """
    found: list[BlockParts | None] = []
    # Modules right inside a block are asked first: fewer pairs, and less that is alike by chance.
    for deep in (False, True):
        inside = [list(b.modules())[1:] if deep else list(b.children()) for b in blocks]
        found = _trace(blocks, inside, run)
        if all(found):
            break
    missing = next((layer for layer, parts in enumerate(found) if parts is None), None)
    if missing is not None:
        raise LensError(
            f"what block {missing} ({type(blocks[missing]).__name__}) adds to the stream is no sum of what two of its "
            "modules give; leave attention and mlp out for this model."
        )
    return [parts for parts in found if parts is not None]


def _trace(
    blocks: Sequence[nn.Module], inside: Sequence[Sequence[nn.Module]], run: Callable[[], Any]
) -> list[BlockParts | None]:
    owners = [layer for layer, modules in enumerate(inside) for _ in modules]
    modules = [module for modules in inside for module in modules]
    calls: list[list[tuple[nn.Module, torch.Tensor]]] = [[] for _ in blocks]
    ends: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(index: int, given: Any, output: Any) -> None:
        if index >= len(modules):
            ends[index - len(modules)] = (given.detach().clone(), stream_of(output).detach().clone())
        elif isinstance(output, torch.Tensor) or (isinstance(output, tuple) and isinstance(output[0], torch.Tensor)):
            # A copy, since some models add to it in place.
            calls[owners[index]].append((modules[index], stream_of(output).detach().clone()))

    with watching([*modules, *blocks], see):
        run()
    return [_explain(*ends[layer], calls[layer]) if layer in ends else None for layer in range(len(blocks))]


def _explain(
    start: torch.Tensor, end: torch.Tensor, calls: Sequence[tuple[nn.Module, torch.Tensor]]
) -> BlockParts | None:
    fitting = [(m, x) for m, x in calls if x.numel() == end.numel() and x.shape[-1] == end.shape[-1]]
    if start.numel() != end.numel() or not fitting:
        return None
    columns = torch.stack([v.reshape(-1, v.shape[-1]).double().cpu() for v in (start, *(x for _, x in fitting), end)])
    # Some tokens have streams a thousand times as large, whose rounding alone would drown what a block adds.
    sizes = columns[[0, -1]].norm(dim=-1).amax(0).clamp(min=1e-30)  # (tokens,)
    columns = (columns / sizes[:, None]).flatten(1).T  # (entries, candidates)
    columns, target = columns[:, :-1], columns[:, -1]
    rounding = 2 * torch.finfo(end.dtype).eps * len(sizes) ** 0.5
    limit = UNEXPLAINED * _residual(columns[:, :1], target)[1] + rounding
    best: list[tuple[float, list[Share]]] = []  # of one module, of two
    for size in (1, 2):
        found: tuple[float, list[Share]] = math.inf, []
        for chosen in combinations(range(len(fitting)), size):
            factors, rest = _residual(columns[:, [0, *(i + 1 for i in chosen)]], target)
            # A module that gives the whole new stream explains it too; what it *adds* is then unknown.
            if rest <= limit and rest < found[0] and abs(factors[0]) > 1e-2:
                found = rest, [Share(fitting[i][0], _plain(f)) for i, f in zip(chosen, factors[1:], strict=True)]
        best.append(found)
    (one, alone), (two, pair) = best
    shares = pair if two < 0.5 * one else alone  # a second one always explains a little more
    return _named(shares) if shares else None


def _residual(columns: torch.Tensor, target: torch.Tensor) -> tuple[list[float], float]:
    factors = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    return factors.tolist(), float((target - columns @ factors).norm())


def _plain(factor: float) -> float:
    return 1.0 if abs(factor - 1.0) < 1e-3 else factor


def _named(shares: list[Share]) -> BlockParts:
    if len(shares) == 2:  # in the order of their calls, which starts with attention in every family
        return BlockParts(*shares)
    name = type(shares[0].module).__name__.lower()
    return BlockParts(None, shares[0]) if any(word in name for word in _MLP_WORDS) else BlockParts(shares[0], None)
