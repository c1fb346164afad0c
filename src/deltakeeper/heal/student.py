"""The base with a compressed delta beside its weights, differentiable in those values of it that may be trained."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.errors import DeltakeeperError
from deltakeeper.heal.terms import TrainedTerms
from deltakeeper.layouts import Layout
from deltakeeper.manifest import TensorRecord
from deltakeeper.payload_writer import as_bytes
from deltakeeper.reconstruct import reconstruct

Trainable = Literal["scales", "scales+uncompressed"]
Prepare = Callable[[str, list[Layout], bool], TrainedTerms]


class _HealedLinear(nn.Module):
    """`x W_baseᵀ + x Dᵀ`; a delta that has to be dense for that is made anew in the backward pass."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, trained: TrainedTerms, flip: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.trained, self.flip = weight, bias, trained, flip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.T if self.flip else self.weight
        y = F.linear(x, weight, self.bias)
        return y + self.trained.product(x)  # (..., out)


class _HealedEmbedding(nn.Module):
    """A base row plus a delta row, summed in float32."""

    def __init__(self, embedding: nn.Embedding, trained: TrainedTerms) -> None:
        super().__init__()
        self.embedding, self.trained = embedding, trained
        self.weight = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.embedding(ids)
        total: torch.Tensor = rows.float() + self.trained.rows(ids) * getattr(self.embedding, "embed_scale", 1.0)
        return total.to(rows.dtype)


class _HealedValue(nn.Module):
    """Stands for a parameter that no matrix product uses, or whose whole value is trained, as norms and biases are."""

    def __init__(self, trained: TrainedTerms) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        found = self.trained.dense().to(before.device)
        return (found if self.trained.replaces else before.float() + found).to(before.dtype)


@dataclass(frozen=True)
class Student:
    """A live model, and the terms that are trained, by tensor."""

    model: Any
    trained: dict[str, TrainedTerms]

    def parameters(self) -> list[nn.Parameter]:
        """Every step, in the order of the tensors; nothing else of the model takes a gradient."""
        return [step for name in sorted(self.trained) for step in self.trained[name].steps.values()]

    @contextmanager
    def as_stored(self) -> Iterator[dict[str, list[Layout]]]:
        """For the length of a `with` block the model runs on what would be written, rounded to the stored dtypes.

        Yields:
            The trained terms by tensor.

        Raises:
            LayoutError: a value left what its stored dtype holds.
        """
        with torch.no_grad():
            packed = {name: found.packed() for name, found in self.trained.items()}
        try:
            for name, found in self.trained.items():
                found.stored = packed[name]
            yield packed
        finally:
            for found in self.trained.values():
                found.stored = None


def check_forms(artifact: DeltaArtifact) -> None:
    """Refuse, from the manifest alone, what has no form that can be trained.

    Raises:
        DeltakeeperError: a delta is to fused experts or to a vocabulary of another size, or two tensors come from one
            of the base.
    """
    records = {name: record for name in artifact.names if (record := artifact.record(name)).encoding != "tied"}
    origins = Counter(record.base_name for record in records.values() if record.base_name is not None)
    for name, record in records.items():
        packed = record.encoding == "terms"
        if packed and (record.base_shape != record.shape or any(term.slice is not None for term in record.terms)):
            raise DeltakeeperError(
                f"tensor '{name}' {record.shape} cannot be healed, since the base has it as {record.base_shape} or it "
                "is a stack of experts; heal artifacts without grown vocabularies and fused experts."
            )
        if record.base_name is not None and origins[record.base_name] > 1:
            raise DeltakeeperError(
                f"tensor '{name}' and another one both come from the base's '{record.base_name}', which cannot be "
                "healed; heal fine-tunes that tie their head as their base does."
            )


def build_student(
    model: nn.Module, artifact: DeltaArtifact, trainable: Trainable, prepare: Prepare | None = None
) -> Student:
    """Put an artifact beside the weights of its live base; the base's own parameters stay frozen.

    Args:
        model: the base, loaded.
        artifact: the delta.
        trainable: which values.
        prepare: gives the terms in training from a tensor's name and its terms, in the place of `TrainedTerms`.

    Raises:
        DeltakeeperError: a tensor does not fit the model, or is of a kind that has no trainable form, such as fused
            experts.
    """
    check_forms(artifact)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {name for name in artifact.names if artifact.record(name).encoding != "tied"}
    known = {id(parameters[name]) for name in stored & parameters.keys()}
    for name, parameter in parameters.items():
        if id(parameter) not in known:
            raise DeltakeeperError(
                f"the model has a '{name}' that the artifact does not have, or ties to another tensor; heal fine-tunes "
                "whose tensors are called and tied as those of the loaded base are."
            )
    model.requires_grad_(False)
    trained: dict[str, TrainedTerms] = {}
    names = [name for name in artifact.names if artifact.record(name).encoding == "terms"]
    # Matrices first: the layer in the place of theirs takes their bias along, which may be trained afterwards.
    for name in sorted(names, key=lambda name: len(artifact.record(name).shape) != 2):
        record, terms = artifact.record(name), artifact.terms(name)
        train = not terms[0].replaces or trainable == "scales+uncompressed"
        found = prepare(name, terms, train) if prepare else TrainedTerms(terms, train)
        if found.steps:
            trained[name] = found
        _put(model, name, record, found)
    return Student(model, trained)


def _put(model: nn.Module, name: str, record: TensorRecord, found: TrainedTerms) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameter = parameters.get(name)
    if parameter is None or tuple(parameter.shape) != record.shape:
        raise DeltakeeperError(
            f"tensor '{name}' {record.shape} cannot be healed in this model, which calls it otherwise or fuses it with "
            "others on loading."
        )
    aliases = [alias for alias, other in parameters.items() if other is parameter]
    if len(record.shape) == 2 and not found.replaces:
        for alias in aliases:
            _wrap(model, alias, found)
    elif found.steps:
        value = _HealedValue(found)
        for alias in aliases:
            path, _, leaf = alias.rpartition(".")
            nn.utils.parametrize.register_parametrization(model.get_submodule(path), leaf, value)
    else:
        merged = reconstruct(record, found.terms, parameter.data.cpu(), None, parameter.dtype)
        parameter.data = merged.to(parameter.device)


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


def checksums(model: nn.Module) -> dict[str, int]:
    """CRC-32 of every frozen parameter's bytes, to see that none of them changes."""
    frozen = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return {name: zlib.crc32(as_bytes(parameter.detach().cpu())) for name, parameter in frozen}
