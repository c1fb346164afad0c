"""The base with a compressed delta beside its weights, differentiable in those values of it that may be trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.errors import DeltakeeperError
from deltakeeper.layouts import Layout
from deltakeeper.manifest import TensorRecord
from deltakeeper.reconstruct import reconstruct

Trainable = Literal["scales", "scales+uncompressed"]


class TrainedTerms(nn.Module):
    """The terms of one tensor with steps on their continuous values: `value + unit * step`.

    A unit is the root mean square of a value tensor, so that one learning rate fits scales of any magnitude.
    """

    def __init__(self, terms: list[Layout], train: bool) -> None:
        super().__init__()
        self.terms = terms
        self.steps = nn.ParameterDict()
        self._values: dict[str, torch.Tensor] = {}
        self._units: dict[str, float] = {}
        for i, term in enumerate(terms):
            for suffix, value in (term.continuous() if train else {}).items():
                key = f"{i}|{suffix}".replace(".", "~")  # a dot would be a path in a module
                unit = float(value.double().square().mean().sqrt())
                if unit > 0:
                    self._values[key], self._units[key] = value, unit
                    self.steps[key] = nn.Parameter(torch.zeros_like(value, dtype=torch.float32))

    def dense(self) -> torch.Tensor:
        """The sum of the terms, float32 `(out, in)`, or the value where the only term is one."""
        total: torch.Tensor | None = None
        for i, term in enumerate(self.terms):
            values = self._of(i)
            part = term.dense_from(term.continuous() | values) if values else term.to_dense().float()
            total = part if total is None else total + part
        if total is None:
            raise ValueError("a tensor without terms has no delta")
        return total

    def packed(self) -> list[Layout]:
        """The terms with their trained values."""
        return [
            term.replace_continuous(term.continuous() | values) if (values := self._of(i)) else term
            for i, term in enumerate(self.terms)
        ]

    def _of(self, term: int) -> dict[str, torch.Tensor]:
        found = {}
        for key, step in self.steps.items():
            number, suffix = key.replace("~", ".").split("|", 1)
            if int(number) == term:
                found[suffix] = self._values[key] + self._units[key] * step
        return found


class _HealedLinear(nn.Module):
    """`x W_baseᵀ + x Dᵀ`; the dense delta is made anew in the backward pass instead of being kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, trained: TrainedTerms, flip: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.trained, self.flip = weight, bias, trained, flip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.T if self.flip else self.weight
        y = F.linear(x, weight, self.bias)
        added: torch.Tensor = checkpoint(self._product, x, use_reentrant=False)
        return y + added  # (..., out)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.trained.dense().to(x.dtype))


class _HealedEmbedding(nn.Module):
    """A base row plus a delta row, summed in float32."""

    def __init__(self, embedding: nn.Embedding, trained: TrainedTerms) -> None:
        super().__init__()
        self.embedding, self.trained = embedding, trained
        self.weight = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.embedding(ids)
        added: torch.Tensor = checkpoint(self._rows, ids, use_reentrant=False)
        total: torch.Tensor = rows.float() + added * getattr(self.embedding, "embed_scale", 1.0)
        return total.to(rows.dtype)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.trained.dense())


class _HealedValue(nn.Module):
    """Stands for a parameter whose whole value is trained, as norms and biases are."""

    def __init__(self, trained: TrainedTerms, dtype: torch.dtype) -> None:
        super().__init__()
        self.trained, self.dtype = trained, dtype

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.trained.dense().to(self.dtype)


@dataclass(frozen=True)
class Student:
    """A live model, and the terms that are trained, by tensor."""

    model: Any
    trained: dict[str, TrainedTerms]

    def parameters(self) -> list[nn.Parameter]:
        """Every step, in the order of the tensors; nothing else of the model takes a gradient."""
        return [step for name in sorted(self.trained) for step in self.trained[name].steps.values()]


def build_student(model: nn.Module, artifact: DeltaArtifact, trainable: Trainable) -> Student:
    """Put an artifact beside the weights of its live base; the base's own parameters stay frozen.

    Raises:
        DeltakeeperError: a tensor does not fit the model, or is of a kind that has no trainable form, such as fused
            experts.
    """
    model.requires_grad_(False)
    trained: dict[str, TrainedTerms] = {}
    for name in artifact.names:
        record = artifact.record(name)
        if record.encoding != "terms":
            continue
        terms = artifact.terms(name)
        value = terms[0].replaces
        train = trainable == "scales+uncompressed" if value else True
        found = TrainedTerms(terms, train)
        if found.steps:
            trained[name] = found
        _put(model, name, record, found, artifact)
    return Student(model, trained)


def _put(model: nn.Module, name: str, record: TensorRecord, found: TrainedTerms, artifact: DeltaArtifact) -> None:
    path, _, leaf = name.rpartition(".")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameter = parameters.get(name)
    if parameter is None or tuple(parameter.shape) != record.shape or record.base_shape != record.shape:
        raise DeltakeeperError(
            f"tensor '{name}' {record.shape} cannot be healed in this model, whose shape or name for it differs; heal "
            "artifacts without grown vocabularies and fused experts."
        )
    module = model.get_submodule(path)
    if found.terms[0].replaces or len(record.shape) != 2:
        if found.steps and leaf in module._parameters:
            nn.utils.parametrize.register_parametrization(module, leaf, _HealedValue(found, parameter.dtype))
        else:
            merged = reconstruct(record, found.terms, parameter.data, artifact.added_rows(name), parameter.dtype)
            parameter.data = merged
        return
    for alias in [n for n, p in parameters.items() if p is parameter]:
        _wrap(model, alias, found)


def _wrap(model: nn.Module, name: str, found: TrainedTerms) -> None:
    path, _, _ = name.rpartition(".")
    module, owner = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    attribute = path.rpartition(".")[2]
    if isinstance(module, nn.Embedding):
        setattr(owner, attribute, _HealedEmbedding(module, found))
    elif isinstance(module, nn.Linear):
        setattr(owner, attribute, _HealedLinear(module.weight, module.bias, found, flip=False))
    elif type(module).__name__ == "Conv1D":
        weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
        setattr(owner, attribute, _HealedLinear(weight, bias, found, flip=True))
    else:
        raise DeltakeeperError(f"tensor '{name}' belongs to a {type(module).__name__}, which cannot be healed.")


def versions(model: nn.Module) -> Iterator[tuple[str, int]]:
    """How often each frozen parameter was written to, to see that none was."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter._version


def packed_terms(trained: Mapping[str, TrainedTerms]) -> dict[str, list[Layout]]:
    """The trained terms by tensor."""
    with torch.no_grad():
        return {name: found.packed() for name, found in trained.items()}
