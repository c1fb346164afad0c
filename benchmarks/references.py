"""The published code of each method, run as it is: single functions and classes out of checkouts of the authors' files.

Only what is named is compiled, because the files import GPU libraries that the functions themselves do not use.
`deltatensors` is a package: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import ast
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

SOURCES = {
    "BitDelta": "https://github.com/FasterDecoding/BitDelta",
    "MergeLM": "https://github.com/yule-BUAA/MergeLM",
    "UltraDelta": "https://github.com/xiaohuiwang000/UltraDelta",
    "ComPEFT": "https://github.com/prateeky2806/ComPEFT",
    "deltazip": "https://github.com/eth-easl/deltazip",
    "ImPart": "https://github.com/sustech-nlp/ImPart",
    "Delta-CoMe": "https://github.com/thunlp/Delta-CoMe",
}

Pair = tuple[torch.Tensor, torch.Tensor]


def load_definitions(path: Path, names: set[str], **namespace: Any) -> dict[str, Any]:
    """Compile the named functions and classes of a file, and nothing else of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    chosen = [node for node in tree.body if getattr(node, "name", None) in names]
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "math": math, "time": time, **namespace}
    exec(compile(ast.Module(chosen, []), str(path), "exec"), scope)
    return scope


def bitdelta(root: Path) -> Callable[[Pair], object]:
    """`BinaryDiff(base, finetune)`: sign, scale and packed mask of one matrix."""
    scope = load_definitions(root / "BitDelta/bitdelta/binary_gemm_kernel.py", {"pack"})
    scope = load_definitions(root / "BitDelta/bitdelta/diff.py", {"BinaryDiff"}, pack=scope["pack"])
    return lambda pair: scope["BinaryDiff"](*pair)


def mergelm(root: Path, strategy: str, rate: float) -> Callable[[Pair], object]:
    """DARE's random mask, or magnitude pruning; dense results, nothing is packed."""
    scope = load_definitions(
        root / "MergeLM/model_merging_methods/mask_weights_utils.py", {"mask_input_with_mask_rate"}
    )
    rescale = strategy == "random"
    return lambda pair: scope["mask_input_with_mask_rate"](pair[1].float() - pair[0].float(), rate, rescale, strategy)


def ultradelta(root: Path, bits: int, rate: float) -> Callable[[Pair], object]:
    """Uniform quantisation, then random pruning within each value; dense results."""
    scope = load_definitions(
        root / "UltraDelta/src/ultradelta_compression.py", {"quantize_delta", "mask_unique_values"}
    )
    return lambda pair: scope["mask_unique_values"](
        scope["quantize_delta"](pair[1].float() - pair[0].float(), bits), rate
    )


def compeft(root: Path, keep: float) -> Callable[[Pair], object]:
    """Top-k by magnitude of the flattened delta, sign and scale; dense results."""
    scope = load_definitions(root / "ComPEFT/src/merge_utils.py", {"topk_values_mask"})

    def run(pair: Pair) -> object:
        delta = (pair[1].float() - pair[0].float()).reshape(1, -1)  # (tasks, entries)
        kept, *_ = scope["topk_values_mask"](delta, K=keep, return_mask=False)
        return torch.sign(kept) * delta.std()

    return run


def deltazip(root: Path, gram: torch.Tensor) -> Callable[[Pair], object]:
    """`SparseGPT.fasterprune` with 2:4 sparsity on the delta, without its quantiser; dense results."""
    logger = SimpleNamespace(debug=print, info=lambda *_: None, warning=lambda *_: None)
    scope = load_definitions(
        root / "deltazip/deltazip/core/sparsegpt.py",
        {"SparseGPT"},
        logger=logger,
        calculate_sparsity=lambda tensor: float((tensor == 0).float().mean()),
        DEBUG=False,
    )

    def run(pair: Pair) -> object:
        layer = nn.Linear(pair[1].shape[1], pair[1].shape[0], bias=False)
        layer.weight.data = pair[1]
        work = scope["SparseGPT"](layer)
        work.H, work.nsamples = gram.clone(), 1
        synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda *_: None  # it asks for a GPU otherwise
        try:
            return work.fasterprune(0.5, 2, 4, base_weight=pair[0])
        finally:
            torch.cuda.synchronize = synchronize

    return run


def delta_come(root: Path, ranks: dict[int, int]) -> Callable[[Pair], object]:
    """The exact decomposition, and bands of both factors rounded by `Quantizer`; its GPTQ is not in the repository."""
    scope = load_definitions(root / "Delta-CoMe/load_delta.py", {"decomposition"})
    scope |= load_definitions(root / "Delta-CoMe/quant/quantizer.py", {"Quantizer"})

    def run(pair: Pair) -> object:
        u, s, v = scope["decomposition"](pair[1].float() - pair[0].float(), dim=sum(ranks.values()))
        total, start = torch.zeros(pair[0].shape), 0
        for bits, count in ranks.items():
            band = slice(start, start + count)
            left, right = (_rounded(scope["Quantizer"](), part[:, band].T, bits) for part in (u, v))
            total += left.T @ torch.diag(s[band]) @ right
            start += count
        return total

    return run


def _rounded(quantizer: Any, vectors: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """Vectors rounded in groups of neighbours, as Delta-CoMe configures its quantiser."""
    quantizer.configure(bits, perchannel=True, sym=True, mse=False)
    parts = []
    for part in vectors.contiguous().split(group, dim=1):
        quantizer.find_params(part, weight=True)
        parts.append(quantizer.quantize(part))
    return torch.cat(parts, dim=1)


def impart(root: Path, ratio: float, beta: float = 0.8, power: float = 0.5) -> Callable[[Pair], object]:
    """The exact decomposition, rates by importance, and factors thinned out at random; dense results."""
    scope = load_definitions(root / "ImPart/delta.py", {"decomposition"})
    names = {"cal_sparsity_ratios", "apply_sparsify"}
    scope |= load_definitions(root / "ImPart/sparsify/sparsify.py", names, dtype_16=torch.bfloat16)

    def run(pair: Pair) -> object:
        u, s, v = scope["decomposition"](pair[1].float() - pair[0].float())
        share = (1 + (1 - 1 / ratio)) / 2
        rates = scope["cal_sparsity_ratios"](s.tolist(), share, beta, power)
        kept = 1 - torch.tensor(rates)
        u, v = (scope["apply_sparsify"](part[:, : len(rates)], rates) / kept for part in (u, v))
        return u @ torch.diag(s[: len(rates)]) @ v.T

    return run


def deltatensors(strategy: str) -> Callable[[Pair], object]:
    """`deltatensors.compress` of a float32 delta."""
    from deltatensors.compress import compress

    return lambda pair: compress((pair[1].float() - pair[0].float()).numpy(), strategy)
