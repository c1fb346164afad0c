"""Run a live model with a delta beside its weights, unmerged, and take it off again without a trace.

Adding a small delta into bfloat16 weights rounds much of it away, and that alone can look like a safety gain. Here the
product is `y = [x, x] · [W_base, D]ᵀ`: one matrix product whose accumulator is float32, so nothing of the delta is lost
to the rounding of the base weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from deltakeeper.errors import DeltakeeperError


@dataclass(frozen=True)
class Change:
    """What a delta does to one tensor: add `tensor` to it (`delta`), or stand in its place (`value`)."""

    name: str
    kind: Literal["delta", "value"]
    tensor: torch.Tensor


class _SumLinear(nn.Module):
    """Linear layer over `[W_base, D]`, in the base weight's dtype."""

    def __init__(self, weight: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([weight, delta.to(weight)], 1), requires_grad=False)
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = F.linear(torch.cat([x, x], -1), self.weight, self.bias)
        return y  # (..., out)


class _SumEmbedding(nn.Module):
    """Embedding whose rows are the sum of a base row and a delta row, rounded once as an activation."""

    def __init__(self, embedding: nn.Embedding, delta: torch.Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        self.weight = embedding.weight
        self.register_buffer("delta", delta.to(embedding.weight.device), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Subclasses of nn.Embedding (Gemma) scale their rows by a constant, so the base row may differ from the weight.
        rows = self.embedding(ids)
        scale = getattr(self.embedding, "embed_scale", 1.0)
        delta = F.embedding(ids, self.get_buffer("delta")) * scale
        total: torch.Tensor = rows.float() + delta.float()
        return total.to(rows.dtype)


@contextmanager
def attached(model: nn.Module, changes: Iterable[Change]) -> Iterator[nn.Module]:
    """Attach changes to `model` for the length of a `with` block; afterwards every bit is as before.

    Args:
        model: a Hugging Face decoder whose state-dict names are checkpoint names.
        changes: one change a tensor, in checkpoint coordinates and shapes (GPT-2's Conv1D stays `(in, out)`).

    Raises:
        DeltakeeperError: a name or a shape does not fit the model (as with experts that transformers fuses on
            loading): write a merged checkpoint with `apply` and load that instead.
    """
    undo: list[tuple[nn.Module, str, nn.Module | nn.Parameter]] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        for change in changes:
            parameter = parameters.get(change.name)
            if parameter is None or tuple(parameter.shape) != tuple(change.tensor.shape):
                raise DeltakeeperError(
                    f"tensor '{change.name}' {tuple(change.tensor.shape)} of the delta does not fit the loaded model; "
                    "write a merged checkpoint with `deltakeeper apply` and load that instead."
                )
            aliases = [n for n, p in parameters.items() if p is parameter]
            for alias in aliases:
                _attach_one(model, alias, change, undo)
        yield model
    finally:
        for owner, attribute, original in reversed(undo):
            setattr(owner, attribute, original)


def _attach_one(
    model: nn.Module, name: str, change: Change, undo: list[tuple[nn.Module, str, nn.Module | nn.Parameter]]
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    owner = model.get_submodule(path.rpartition(".")[0])
    attribute = path.rpartition(".")[2]
    original = getattr(module, leaf)
    if change.kind == "value" or leaf != "weight":
        moved = change.tensor.to(original.device)
        value = moved if change.kind == "value" else original.detach().float() + moved
        undo.append((module, leaf, original))
        setattr(module, leaf, nn.Parameter(value.to(original.dtype), requires_grad=False))
    elif isinstance(module, nn.Linear):
        undo.append((owner, attribute, module))
        setattr(owner, attribute, _SumLinear(module.weight, change.tensor, module.bias))
    elif isinstance(module, nn.Embedding):
        undo.append((owner, attribute, module))
        setattr(owner, attribute, _SumEmbedding(module, change.tensor))
    elif type(module).__name__ == "Conv1D":
        undo.append((owner, attribute, module))
        bias = module.get_parameter("bias")
        setattr(owner, attribute, _SumLinear(module.get_parameter("weight").T, change.tensor.T, bias))
    else:
        undo.append((module, leaf, original))
        merged = original.detach().float() + change.tensor.to(original.device)
        setattr(module, leaf, nn.Parameter(merged.to(original.dtype), requires_grad=False))
